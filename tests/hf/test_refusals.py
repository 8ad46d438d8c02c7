"""A checkpoint that is not exactly the model is refused, with the tensor and the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsjax.hf import from_pretrained, save_pretrained
from dsjax.hf.folder import SINGLE, Folder
from dsjax.hf.safetensors import Spec, write

Tensors = dict[str, np.ndarray]
DOWN = "model.layers.0.mlp.down_proj.weight"
SCALE = f"{DOWN}_scale_inv"


@pytest.fixture
def changed(golden, tmp_path) -> Callable[..., Path]:
    """A golden checkpoint after a change of its tensors."""

    def build(change: Callable[[Tensors], object], name: str = "v3_tiny") -> Path:
        tensors = dict(Folder(golden / name))
        change(tensors)
        specs = [Spec(name, a.dtype, a.shape) for name, a in tensors.items()]
        write(tmp_path / SINGLE, specs, tensors.__getitem__)
        (tmp_path / "config.json").write_text((golden / name / "config.json").read_text())
        return tmp_path

    return build


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(DOWN), f"{DOWN} is missing"),
        (lambda t: t.update(extra=np.ones(1, np.float32)), "unexpected tensor extra"),
        (
            lambda t: t.update({DOWN: t[DOWN].T}),
            r"down_proj.weight has shape \[256, 128\], expected \[128, 256\]",
        ),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.int8)}), "is int8, expected one of"),
        (
            lambda t: t.update({DOWN: t[DOWN].astype(ml_dtypes.float8_e4m3fn)}),
            "is FP8, but config.json says nothing",
        ),
        (
            lambda t: t.pop("model.layers.3.mlp.gate.e_score_correction_bias"),
            "model.layers.3.mlp.gate.e_score_correction_bias is missing",
        ),
    ],
)
def test_wrong_tensor_is_refused(changed, change, reason):
    with pytest.raises(ValueError, match=reason):
        from_pretrained(changed(change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(SCALE), "_scale_inv is missing"),
        (lambda t: t.update({SCALE: t[SCALE][:1]}), r"float32 \[1, 3\], expected float32 \[2, 3\]"),
        (lambda t: t.update({SCALE: t[SCALE] * np.float32("nan")}), "not finite"),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.float32)}), "unexpected tensor .*_scale_inv"),
    ],
)
def test_wrong_scale_is_refused(changed, change, reason):
    with pytest.raises(ValueError, match=reason):
        from_pretrained(changed(change, "v3_tiny_fp8"))


def test_buffers_of_old_exports_are_ignored(changed):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    from_pretrained(changed(lambda tensors: tensors.update(buffer)))


def test_truncated_file_is_refused(changed):
    folder = changed(lambda tensors: None)
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-1000])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        from_pretrained(folder)


def test_mtp_copy_that_differs_is_refused(random_model, tmp_path):
    save_pretrained(random_model(mtp_depth=1), tmp_path / "a")
    tensors = dict(Folder(tmp_path / "a"))
    name = "model.layers.3.shared_head.head.weight"
    tensors[name] = tensors[name] + 1
    specs = [Spec(name, a.dtype, a.shape) for name, a in tensors.items()]
    tensors = {name: array.copy() for name, array in tensors.items()}
    write(tmp_path / "a" / SINGLE, specs, tensors.__getitem__)
    with pytest.raises(ValueError, match=r"shared_head\.head\.weight differs from lm_head\.weight"):
        from_pretrained(tmp_path / "a")


def test_unfinished_save_is_refused(golden, tmp_path):
    (tmp_path / SINGLE).write_bytes((golden / "v3_tiny" / SINGLE).read_bytes())
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="expected a JSON object"):
        from_pretrained(tmp_path)


def test_wrong_arguments_are_refused(golden, random_model, tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int8': use one of bfloat16, float16, float32"):
        from_pretrained(golden / "v3_tiny", "int8")
    with pytest.raises(ValueError, match="dtype is 'half a float'"):
        from_pretrained(golden / "v3_tiny", "half a float")
    with pytest.raises(ValueError, match=r"sharding of .* is 'fsdp': expected a jax Sharding"):
        from_pretrained(golden / "v3_tiny", sharding="fsdp")
    with pytest.raises(ValueError, match="model is a dict: expected a Transformer"):
        save_pretrained({}, tmp_path)
    model = random_model()
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        save_pretrained(model, tmp_path / "a", shard_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, give a folder"):
        save_pretrained(model, tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written"):
        save_pretrained(model, tmp_path / "file" / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer here"):
        save_pretrained(model, tmp_path / "a", tokenizer_from=tmp_path / "empty")
    assert not (tmp_path / "a" / "config.json").exists()
    assert not list((tmp_path / "a").glob(".saving*"))


def test_failed_save_keeps_the_old_checkpoint(random_model, assert_same, tmp_path):
    save_pretrained(random_model(), tmp_path / "a")
    save_pretrained(random_model(), tmp_path / "b")
    broken = random_model(seed=1)
    broken.moe.attn.out.set_value(broken.moe.attn.out[...].at[0, 0, 0, 0].set(np.nan))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight: .* NaN"):
        save_pretrained(broken, tmp_path / "a", dtype="fp8")
    assert_same(tmp_path / "a", tmp_path / "b")
