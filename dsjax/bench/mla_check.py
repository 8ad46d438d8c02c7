"""Whether a timed result is right: its distance from the float32 reference's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.bench.ceilings import Device
from dsjax.bench.mla_shapes import Kind, Shape, work
from dsjax.bench.rows import Row, described

LARGEST_ERROR = 0.03  # a few times what rounding to bfloat16 on the way costs


def checked_row(
    row: Row[Kind, Shape], found: Any, reference: Callable[[], Any], device: Device
) -> Row[Kind, Shape]:
    """The row with its error, unless it is too large to check; failed where the error is large."""
    if work(row.kind, row.shape).flops > device.checked:
        return _noted(row, "too large to check")
    try:
        error = relative_error(found, reference())
    except Exception as problem:  # the timing still counts
        return _noted(row, f"not checked: {described(problem)}", failed=True)
    if not math.isfinite(error):
        return _noted(row, "the result is not finite", failed=True)
    row = dataclasses.replace(row, error=error)
    return row if error <= LARGEST_ERROR else _noted(row, "the result is wrong", failed=True)


def _noted(row: Row[Kind, Shape], note: str, *, failed: bool = False) -> Row[Kind, Shape]:
    return dataclasses.replace(row, note="; ".join(filter(None, [row.note, note])), failed=failed)


def relative_error(found: Any, wanted: Any) -> float:
    """Frobenius norm of the difference over that of the wanted array, the largest of several's."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    errors = [float(_error(x, y)) for x, y in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


@jax.jit
def _error(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = x.astype(jnp.float32).ravel(), y.astype(jnp.float32).ravel()
    return jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), jnp.finfo(jnp.float32).tiny)
