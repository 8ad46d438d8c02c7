"""config.json and dsjax.config.Model, both ways.

What the model does not do is refused by name: a checkpoint that loads is one that runs right.
"""

import math
from typing import Any

from dsjax.config import Model, Yarn
from dsjax.hf.fp8 import BLOCK

_REQUIRED = object()
# Keys that may only have one value (or be absent), because the model knows no other.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
# What the published classes assume when a key is absent.
_DEFAULTS = {
    "deepseek_v2": {
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
_ROPE_KEYS = {"truncate": True, "attention_factor": None}


def to_model(config: dict[str, Any]) -> Model:
    """The model a config.json describes; ValueError names a key that is missing or unsupported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise _unsupported("model_type", kind, " or ".join(map(repr, _DEFAULTS)))
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise _unsupported(key, config[key], repr(value))
    heads = _whole(config, "num_attention_heads")
    if config.get("num_key_value_heads") not in (None, heads):
        raise _unsupported("num_key_value_heads", config["num_key_value_heads"], f"{heads}")
    return Model(
        vocab_size=_whole(config, "vocab_size"),
        dim=_whole(config, "hidden_size"),
        layers=_whole(config, "num_hidden_layers"),
        dense_layers=_whole(config, "first_k_dense_replace"),
        heads=heads,
        q_lora_rank=_whole(config, "q_lora_rank", None),
        kv_lora_rank=_whole(config, "kv_lora_rank"),
        qk_nope_dim=_whole(config, "qk_nope_head_dim"),
        qk_rope_dim=_whole(config, "qk_rope_head_dim"),
        v_dim=_whole(config, "v_head_dim"),
        dense_hidden=_whole(config, "intermediate_size"),
        context=_whole(config, "max_position_embeddings"),
        rope_theta=_theta(config),
        yarn=_yarn(config),
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        init_std=_number(config, "initializer_range", 0.02),
        mtp_depth=_whole(config, "num_nextn_predict_layers", None) or 0,
        **_routing(config, _DEFAULTS[kind]),
    )


def _routing(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    config = defaults | {key: value for key, value in config.items() if value is not None}
    selection = _choice(config, "topk_method", "greedy", "group_limited_greedy", "noaux_tc")
    grouped = 1 if selection == "greedy" else _REQUIRED
    norm = config["norm_topk_prob"]
    if not isinstance(norm, bool):
        raise _unsupported("norm_topk_prob", norm, "true or false")
    return {
        "expert_hidden": _whole(config, "moe_intermediate_size"),
        "experts": _whole(config, "n_routed_experts"),
        "shared_experts": _whole(config, "n_shared_experts", 0),
        "top_k": _whole(config, "num_experts_per_tok"),
        "groups": _whole(config, "n_group", grouped),
        "top_groups": _whole(config, "topk_group", grouped),
        "gate": _choice(config, "scoring_func", "softmax", "sigmoid"),
        "selection": selection,
        "norm_topk": norm,
        "route_scale": _number(config, "routed_scaling_factor"),
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings under either of their names."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _unsupported("rope_scaling", rope, "a table or null")
    return rope


def _theta(config: dict[str, Any]) -> float:
    return _number({"rope_theta": 10000.0} | config | _rope(config), "rope_theta")


def _yarn(config: dict[str, Any]) -> Yarn | None:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("none", "default") or (kind is None and "factor" not in rope):
        return None
    if kind != "yarn":
        raise _unsupported("rope type", kind, "'yarn', 'default' or 'none'")
    for key, value in _ROPE_KEYS.items():
        if rope.get(key, value) != value:
            raise _unsupported(key, rope[key], repr(value))
    return Yarn(
        factor=_number(rope, "factor"),
        original_context=_whole(rope, "original_max_position_embeddings"),
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
        mscale=_number(rope, "mscale", 0.0),
        mscale_all_dim=_number(rope, "mscale_all_dim", 0.0),
    )


def is_fp8(config: dict[str, Any]) -> bool:
    """Whether weights are published-style FP8; ValueError for any other quantisation."""
    found = config.get("quantization_config")
    if found is None:
        return False
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    if not isinstance(found, dict) or any(
        found.get(key, expected["fmt"] if key == "fmt" else None) != value
        for key, value in expected.items()
    ):
        raise _unsupported("quantization_config", found, str(expected))
    return True


def from_model(model: Model, *, dtype: str, fp8: bool, power_of_two: bool = False) -> dict:
    """The config.json of a model; `power_of_two` says that all FP8 scales are such."""
    v3 = model.selection == "noaux_tc"
    config: dict[str, Any] = {
        "architectures": [f"Deepseek{'V3' if v3 else 'V2'}ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "first_k_dense_replace": model.dense_layers,
        "head_dim": model.qk_rope_dim,
        "hidden_act": "silu",
        "hidden_size": model.dim,
        "initializer_range": model.init_std,
        "intermediate_size": model.dense_hidden,
        "kv_lora_rank": model.kv_lora_rank,
        "max_position_embeddings": model.context,
        "moe_intermediate_size": model.expert_hidden,
        "moe_layer_freq": 1,
        "n_group": model.groups,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts or None,
        "norm_topk_prob": model.norm_topk,
        "num_attention_heads": model.heads,
        "num_experts_per_tok": model.top_k,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.heads,
        "num_nextn_predict_layers": model.mtp_depth,
        "pretraining_tp": 1,
        "q_lora_rank": model.q_lora_rank,
        "qk_head_dim": model.qk_dim,
        "qk_nope_head_dim": model.qk_nope_dim,
        "qk_rope_head_dim": model.qk_rope_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_scaling": _rope_scaling(model.yarn),
        "rope_theta": model.rope_theta,
        "routed_scaling_factor": model.route_scale,
        "scoring_func": model.gate,
        "tie_word_embeddings": False,
        "topk_group": model.top_groups,
        "topk_method": model.selection,
        "torch_dtype": dtype,
        "use_cache": True,
        "v_head_dim": model.v_dim,
        "vocab_size": model.vocab_size,
    }
    config |= {"rope_interleave": True} if v3 else {"mlp_bias": False}
    if fp8:
        config["quantization_config"] = _quantization(power_of_two)
    return config


def _rope_scaling(yarn: Yarn | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _quantization(power_of_two: bool) -> dict[str, Any]:
    found = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return found | {"scale_fmt": "ue8m0"} if power_of_two else found


def _whole(config: dict[str, Any], key: str, default: Any = _REQUIRED) -> Any:
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if type(value) is not int:
        raise _unsupported(key, value, "a whole number")
    return value


def _number(config: dict[str, Any], key: str, default: Any = _REQUIRED) -> float:
    value = config.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _unsupported(key, value, "a number")
    return float(value)


def _choice(config: dict[str, Any], key: str, *choices: str) -> Any:
    if config[key] not in choices:
        raise _unsupported(key, config[key], " or ".join(map(repr, choices)))
    return config[key]


def _unsupported(key: str, value: object, supported: str) -> ValueError:
    return ValueError(f"config.json: {key} is {value!r}: supported is {supported}")
