"""Our model as a published checkpoint: published names and layout, one tensor at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.hf import config_json, fp8
from dsjax.hf.device import take
from dsjax.hf.folder import CONFIG, read_json, write_folder
from dsjax.hf.load import float_dtype
from dsjax.hf.names import SCALE, Row, table
from dsjax.hf.safetensors import Spec
from dsjax.hf.scales import StoredScales
from dsjax.model import RouterBias, Transformer

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_pretrained(
    model: Transformer,
    path: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write `model` so that this package, and others that read published checkpoints, can load it.

    Without `dtype` a model is written as it was loaded: FP8 for one that came from FP8 (weights
    that did not change keep their bits), else in the dtype it is stored in. `dtype` may be a float
    type or "fp8". The tokenizer's files and its token ids come from the folder `tokenizer_from`.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model is a {type(model).__name__}: expected a Transformer")
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes is {shard_bytes}: it must be greater than 0")
    source = Path(tokenizer_from) if tokenizer_from else None
    tokens = _token_ids(source)
    writer = _Writer(model, dtype)
    write_folder(
        Path(path),
        writer.specs(),
        writer.read,
        lambda: writer.config() | tokens,
        shard_bytes=shard_bytes,
        tokenizer_from=source,
    )


class _Writer:
    """Reads the model's arrays as published tensors."""

    def __init__(self, model: Transformer, dtype: str | jnp.dtype | None) -> None:
        self._model = model
        self._leaves: dict[Any, nnx.Variable] = dict(nnx.to_flat_state(nnx.state(model)))
        self._stored = StoredScales(model)
        self._fp8 = dtype == "fp8" or (dtype is None and bool(self._stored))
        self._dtype = _target(model, "bfloat16" if self._fp8 else dtype)
        self._power_of_two = self._stored.power_of_two()
        self._rows = {row.name: row for row in table(model.config)}
        self._last_scales: tuple[str, np.ndarray] | None = None

    def specs(self) -> list[Spec]:
        return [spec for row in self._rows.values() for spec in self._specs(row)]

    def _specs(self, row: Row) -> Iterator[Spec]:
        leaf = self._leaves[row.path]
        shape = row.shape(leaf.shape)
        if self._quantised(row):
            yield Spec(row.name, fp8.E4M3, shape)
            yield Spec(row.name + SCALE, np.dtype(np.float32), fp8.scale_shape(shape))
        else:
            bias = isinstance(leaf, RouterBias)
            yield Spec(row.name, np.dtype(np.float32) if bias else self._dtype, shape)

    def _quantised(self, row: Row) -> bool:
        """A model from FP8 keeps what its checkpoint had in FP8; else all that usually is."""
        wanted = self._stored.get(row) is not None if self._stored else row.fp8
        return self._fp8 and wanted

    def read(self, name: str) -> np.ndarray:
        """One published tensor; a weight's scales are asked for right after the weight."""
        if self._last_scales and name == self._last_scales[0]:
            return self._last_scales[1]
        row = self._rows[name]
        leaf = self._leaves[row.path][...]
        block = take(leaf, row.start(leaf.shape), (1,) * len(row.index) + row.block(leaf.shape))
        tensor = row.published(block, leaf.shape)
        if self._quantised(row):
            return self._quantise(row, tensor)
        bias = isinstance(self._leaves[row.path], RouterBias)
        return tensor if bias else tensor.astype(self._dtype, copy=False)

    def _quantise(self, row: Row, weight: np.ndarray) -> np.ndarray:
        stored = self._stored.get(row)
        try:
            if stored is None:
                bits, scales = fp8.quantise(weight)
            else:
                bits, scales = fp8.requantise(weight, stored, self._power_of_two)
        except ValueError as error:
            raise ValueError(f"{row.name}: {error}") from error
        self._last_scales = row.name + SCALE, scales
        return bits

    def config(self) -> dict[str, Any]:
        return config_json.from_model(
            self._model.config,
            dtype=self._dtype.name,
            fp8=self._fp8,
            power_of_two=self._fp8 and self._power_of_two,
        )


def _target(model: Transformer, dtype: str | jnp.dtype | None) -> np.dtype:
    return float_dtype(model.embed[...].dtype if dtype is None else dtype)


def _token_ids(source: Path | None) -> dict[str, Any]:
    """Ids of the special tokens as the tokenizer's own config.json gives them, else null."""
    found = read_json(source / CONFIG) if source and (source / CONFIG).is_file() else {}
    return {key: found.get(key) for key in _TOKENS}
