"""config.json: both spellings in, published keys out, the unsupported refused by name."""

import json

import pytest

from dsjax.config import Model, Yarn
from dsjax.hf import config_json


def published(golden, name: str, **changes: object) -> dict:
    return json.loads((golden / name / "config.json").read_text()) | changes


@pytest.mark.parametrize("name", ["v2_tiny", "v3_tiny", "v3_tiny_fp8"])
def test_published_config_round_trips(golden, name):
    config = published(golden, name)
    model, fp8 = config_json.to_model(config), config_json.is_fp8(config)
    written = config_json.from_model(model, dtype="bfloat16", fp8=fp8)
    assert config_json.to_model(json.loads(json.dumps(written))) == model
    ignored = {"dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert {k: v for k, v in config.items() if k not in ignored}.items() <= written.items()


@pytest.mark.parametrize(
    "model", [Model(), Model(yarn=None, q_lora_rank=None, mtp_depth=0), Model(shared_experts=0)]
)
def test_any_model_round_trips(model):
    for fp8 in (False, True):
        written = config_json.from_model(model, dtype="float32", fp8=fp8)
        assert config_json.to_model(written) == model
        assert config_json.is_fp8(written) == fp8


def test_newer_rope_spelling(golden):
    old = published(golden, "v3_tiny")
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    rope = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
    new["rope_parameters"] = rope | {"rope_type": "yarn", "rope_theta": 5000.0}
    found = config_json.to_model(new)
    assert found.yarn == config_json.to_model(old).yarn
    assert found.rope_theta == 5000.0
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert config_json.to_model(new).yarn is None


def test_absent_keys_take_the_published_defaults(golden):
    v2 = published(golden, "v2_tiny", n_group=None, topk_group=None)
    v3 = published(golden, "v3_tiny")
    for key in ("topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor"):
        v2.pop(key)
        v3.pop(key)
    v3.pop("num_nextn_predict_layers")
    v3["rope_scaling"] = {k: v for k, v in v3["rope_scaling"].items() if "mscale" not in k}
    found = config_json.to_model(v2)
    assert (found.selection, found.gate, found.norm_topk) == ("greedy", "softmax", False)
    assert (found.groups, found.top_groups, found.route_scale) == (1, 1, 1.0)
    found = config_json.to_model(v3)
    assert (found.selection, found.gate, found.norm_topk) == ("noaux_tc", "sigmoid", True)
    assert (found.route_scale, found.mtp_depth) == (2.5, 0)
    assert found.yarn == Yarn(4.0, 64, 32, 1, mscale=0.0, mscale_all_dim=0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", ["deepseek_v3"]),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("moe_layer_freq", 2),
        ("hidden_act", "gelu"),
        ("rope_interleave", False),
        ("num_key_value_heads", 1),
        ("hidden_size", "128"),
        ("hidden_size", None),
        ("hidden_size", True),
        ("rms_norm_eps", float("inf")),
        ("n_group", None),
        ("topk_method", "random"),
        ("scoring_func", "tanh"),
        ("norm_topk_prob", 1),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"factor": 2.0}),
        ("rope_scaling", "yarn"),
        ("truncate", False),
    ],
)
def test_unsupported_is_refused_by_name(golden, key, value):
    config = published(golden, "v3_tiny")
    target = config["rope_scaling"] if key == "truncate" else config
    target[key] = value
    word = "rope" if key == "rope_scaling" else key
    with pytest.raises(ValueError, match=rf"config.json: {word}.* is .*: supported is"):
        config_json.to_model(config)


@pytest.mark.parametrize(
    "value",
    [{"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8"],
)
def test_other_quantisation_is_refused(golden, value):
    with pytest.raises(ValueError, match="quantization_config is"):
        config_json.is_fp8(published(golden, "v3_tiny", quantization_config=value))
