"""A published checkpoint as our model.

The files' headers are checked in full against the table of names before anything is allocated.
Then every array is made once, on its devices, and filled one published tensor at a time, so that
loading needs the model's own size and one tensor.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from dsjax.config import Model
from dsjax.hf import config_json, fp8
from dsjax.hf.device import Leaf
from dsjax.hf.folder import CONFIG, Folder, read_json
from dsjax.hf.names import SCALE, Row, mtp_prefix, table
from dsjax.hf.scales import Scales
from dsjax.model import RouterBias, Transformer

Where = tuple[Any, ...]
Place = Sharding | Callable[[Where, jax.ShapeDtypeStruct], Sharding] | None
FLOATS = tuple(map(np.dtype, (ml_dtypes.bfloat16, np.float16, np.float32)))
_IGNORED = ".rotary_emb.inv_freq"


def from_pretrained(
    path: str | os.PathLike[str], dtype: str | jnp.dtype = "bfloat16", *, sharding: Place = None
) -> Transformer:
    """The model in a folder of the published format, BF16, FP16, FP32 or FP8, stored in `dtype`.

    `sharding` is one for all arrays or a function of an array's path and shape. FP8 weights are
    dequantised in float32 and rounded to `dtype`; their scales stay in `model.fp8_scales`. Raises
    ValueError for whatever is missing, unexpected, damaged, of wrong shape or unsupported.
    """
    dtype = float_dtype(dtype)
    files = Folder(path)
    settings = read_json(Path(path) / CONFIG)
    config = _without_absent_mtp(config_json.to_model(settings), files)
    abstract = nnx.eval_shape(lambda: _build(config, dtype))
    graph, state = nnx.split(abstract)
    shapes = dict(nnx.to_flat_state(state))
    rows = list(table(config))
    _check(files, rows, shapes, config_json.is_fp8(settings))
    leaves = {
        where: Leaf(shape.shape, _storage(shape, dtype), _placed(sharding, where, shape))
        for where, shape in shapes.items()
    }
    scales = _fill(leaves, rows, files, dtype)
    filled = [(where, shapes[where].replace(leaf.array())) for where, leaf in leaves.items()]
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    if scales:
        model.fp8_scales = scales.variables()  # ty: ignore[missing-attribute]
    return model


def read_config(path: str | os.PathLike[str]) -> Model:
    """The configuration in a published folder's config.json; ValueError if it is unsupported."""
    return config_json.to_model(read_json(Path(path) / CONFIG))


def stored_dtype(path: str | os.PathLike[str]) -> np.dtype:
    """The float format of a checkpoint's unquantised tensors."""
    return np.dtype(Folder(path).spec("model.embed_tokens.weight").dtype)


def float_dtype(dtype: str | jnp.dtype) -> np.dtype:
    """A dtype weights can be stored in; ValueError for any other."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}: use one of {', '.join(d.name for d in FLOATS)}")
    return found


def _build(config: Model, dtype: np.dtype) -> Transformer:
    precision = "fp32" if dtype == np.float32 else "bf16"
    return Transformer(config, rngs=nnx.Rngs(0), param_dtype=dtype, precision=precision)


def _storage(variable: nnx.Variable, dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if isinstance(variable, RouterBias) else dtype


def _placed(sharding: Place, where: Where, variable: nnx.Variable) -> Sharding | None:
    shape = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
    found = sharding(where, shape) if callable(sharding) else sharding
    if found is not None and not isinstance(found, Sharding):
        raise ValueError(f"sharding of {where} is {found!r}: expected a jax Sharding or None")
    return found


def _without_absent_mtp(config: Model, files: Folder) -> Model:
    """Many conversions drop the MTP layers but leave their number in the config."""
    prefixes = tuple(f"{mtp_prefix(config, depth)}." for depth in range(config.mtp_depth))
    if any(name.startswith(prefixes) for name in files):
        return config
    return replace(config, mtp_depth=0)


def _check(
    files: Folder, rows: list[Row], shapes: dict[Where, nnx.Variable], quantised: bool
) -> None:
    """Names, shapes and types of all tensors, by the headers alone."""
    unknown = {name for name in files if not name.endswith(_IGNORED)}
    for row in rows:
        if row.name not in files:
            if row.copy:
                continue
            raise ValueError(f"{files.path}: {row.name} is missing")
        unknown.remove(row.name)
        _check_tensor(files, row, row.shape(shapes[row.path].shape))
        if files.spec(row.name).dtype == fp8.E4M3:
            _check_scale(files, row, quantised)
            unknown.remove(row.name + SCALE)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(f"{files.path}: unexpected tensor {min(unknown)}{more}: not in this model")


def _check_tensor(files: Folder, row: Row, expected: tuple[int, ...]) -> None:
    spec = files.spec(row.name)
    if spec.shape != expected:
        raise ValueError(
            f"{files.path}: {row.name} has shape {list(spec.shape)}, expected {list(expected)}"
        )
    allowed = (*FLOATS, fp8.E4M3) if row.fp8 else FLOATS
    if spec.dtype not in allowed:
        names = ", ".join(dtype.name for dtype in allowed)
        raise ValueError(f"{files.path}: {row.name} is {spec.dtype}, expected one of {names}")


def _check_scale(files: Folder, row: Row, quantised: bool) -> None:
    name = row.name + SCALE
    if not quantised:
        raise ValueError(f"{files.path}: {row.name} is FP8, but config.json says nothing of it")
    if name not in files:
        raise ValueError(f"{files.path}: {name} is missing, {row.name} is FP8")
    spec, expected = files.spec(name), fp8.scale_shape(files.spec(row.name).shape)
    if spec.shape != expected or spec.dtype != np.float32:
        raise ValueError(
            f"{files.path}: {name} is {spec.dtype} {list(spec.shape)}, "
            f"expected float32 {list(expected)}"
        )


def _fill(leaves: dict[Where, Leaf], rows: list[Row], files: Folder, dtype: np.dtype) -> Scales:
    scales, originals = Scales(), {row.path: row.name for row in rows if not row.copy}
    for row in rows:
        if row.copy:
            _compare(files, row.name, originals[row.path])
            continue
        leaf, tensor = leaves[row.path], files[row.name]
        if tensor.dtype == fp8.E4M3:
            scale = _finite(files, row.name + SCALE)
            scales.add(row, leaf.shape, scale)
            tensor = fp8.dequantise(tensor, scale, dtype)
        leaf.fill(row.ours(tensor, leaf.shape), row.start(leaf.shape))
    return scales


def _finite(files: Folder, name: str) -> np.ndarray:
    scale = files[name]
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise ValueError(f"{files.path}: {name} holds a scale that is negative or not finite")
    return scale


def _compare(files: Folder, name: str, original: str) -> None:
    """The MTP layers repeat embedding and head; ours are shared, so they must be equal."""
    if name not in files:
        return
    copied, first = files[name], files[original]
    rows = range(0, len(first), 1024)
    if copied.dtype != first.dtype or not all(
        np.array_equal(copied[i : i + 1024], first[i : i + 1024]) for i in rows
    ):
        raise ValueError(f"{files.path}: {name} differs from {original}, expected a copy of it")
