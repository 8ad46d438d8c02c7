"""Load and save give the same bits: BF16, FP8, shards, shardings, MTP."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.hf import from_pretrained, save_pretrained
from dsjax.hf.folder import INDEX, SINGLE, Folder
from dsjax.model import RouterBias


def states_equal(a: nnx.Module, b: nnx.Module) -> bool:
    left, right = (jax.tree.leaves(nnx.state(model)) for model in (a, b))
    return len(left) == len(right) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(("name", "dtype"), [("v2_tiny", "bfloat16"), ("v3_tiny", "float32")])
def test_bf16_comes_back_bit_for_bit(golden, name, dtype, assert_same, tmp_path):
    model = from_pretrained(golden / name, dtype)
    assert model.embed[...].dtype == jnp.dtype(dtype)
    assert model.moe.mlp.router.bias[...].dtype == jnp.float32
    save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    assert_same(golden / name, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_comes_back_bit_for_bit(golden, dtype, assert_same, tmp_path):
    source = golden / "v3_tiny_fp8"
    model = from_pretrained(source, dtype)
    save_pretrained(model, tmp_path / "out")
    assert_same(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    save_pretrained(model, tmp_path / "plain", dtype="bfloat16")
    assert not any(name.endswith("_scale_inv") for name in Folder(tmp_path / "plain"))


def test_trained_fp8_model_keeps_untouched_blocks(golden, tmp_path):
    model = from_pretrained(golden / "v3_tiny_fp8", "float32")
    down = model.dense.mlp.down
    down.set_value(down[...].at[0, 200, 100].set(5.0))
    save_pretrained(model, tmp_path)
    name = "model.layers.0.mlp.down_proj.weight_scale_inv"
    before, after = Folder(golden / "v3_tiny_fp8")[name], Folder(tmp_path)[name]
    assert np.argwhere(before != after).tolist() == [[0, 1]]
    assert after[0, 1] == np.float32(5) / np.float32(448)


def test_any_model_can_be_quantised(random_model, tmp_path):
    model = random_model(mtp_depth=1)
    save_pretrained(model, tmp_path, dtype="fp8")
    files = Folder(tmp_path)
    e4m3, bf16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
    assert files["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == e4m3
    for name in ("lm_head", "model.layers.1.mlp.gate", "model.layers.3.eh_proj"):
        assert files[f"{name}.weight"].dtype == bf16
    loaded = from_pretrained(tmp_path, "float32")
    np.testing.assert_allclose(loaded.moe.attn.out[...], model.moe.attn.out[...], atol=0.04)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_model_with_mtp(random_model, dtype, tmp_path):
    model = random_model(dtype=dtype, mtp_depth=1)
    save_pretrained(model, tmp_path)
    files = Folder(tmp_path)
    for copy, original in (
        ("embed_tokens", "model.embed_tokens.weight"),
        ("shared_head.head", "lm_head.weight"),
    ):
        copied = files[f"model.layers.3.{copy}.weight"]
        assert copied.tobytes() == files[original].tobytes()
    loaded = from_pretrained(tmp_path, dtype)
    assert loaded.config == model.config
    assert states_equal(loaded, model)


def test_small_shards_and_saving_again(random_model, assert_same, tokens, tmp_path):
    model = random_model()
    save_pretrained(model, tmp_path / "one")
    save_pretrained(model, tmp_path / "many", shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 3
    assert f"model-00001-of-{len(shards):05}.safetensors" in shards
    assert index["metadata"]["total_size"] == sum(
        a.nbytes for a in Folder(tmp_path / "one").values()
    )
    assert_same(tmp_path / "one", tmp_path / "many")
    loaded = from_pretrained(tmp_path / "many", "float32")
    np.testing.assert_array_equal(loaded(tokens), model(tokens))
    (tmp_path / "many" / "notes.txt").write_text("stays")
    save_pretrained(loaded, tmp_path / "many")
    found = {path.name for path in (tmp_path / "many").iterdir()}
    assert found == {"config.json", SINGLE, "notes.txt"}


def test_sharded_model(random_model, assert_same, tmp_path):
    """Arrays are spread over 4 devices while they are read, and gathered while written."""
    save_pretrained(random_model(), tmp_path / "a")
    mesh = jax.make_mesh((2, 2), ("x", "y"))

    def place(path: tuple, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        spread = P(*[None] * (shape.ndim - 2), "y", "x") if shape.ndim > 1 else P("x")
        even = all(size % 2 == 0 for size in shape.shape[-2:])
        return NamedSharding(mesh, spread if even else P())

    model = from_pretrained(tmp_path / "a", "float32", sharding=place)
    gate_up = model.moe.mlp.experts.gate_up[...]
    assert gate_up.addressable_shards[0].data.size * 4 == gate_up.size
    assert states_equal(model, from_pretrained(tmp_path / "a", "float32"))
    save_pretrained(model, tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b")
    everywhere = from_pretrained(tmp_path / "a", "float32", sharding=NamedSharding(mesh, P()))
    assert len(everywhere.norm[...].addressable_shards) == 4


def test_mtp_that_is_only_promised(golden, tmp_path):
    shutil.copytree(golden / "v3_tiny", tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    assert from_pretrained(tmp_path / "a").config.mtp_depth == 0


def test_tokenizer_and_its_ids_come_along(random_model, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7]}')
    save_pretrained(random_model(), out, tokenizer_from=source)
    assert (out / "tokenizer.json").read_text() == "{}"
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, [6, 7])


def test_bias_is_written_for_noaux_tc_alone(random_model, tmp_path):
    save_pretrained(random_model(selection="greedy"), tmp_path)
    assert not any("e_score_correction_bias" in name for name in Folder(tmp_path))
    biases = nnx.state(from_pretrained(tmp_path), RouterBias)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(biases))
