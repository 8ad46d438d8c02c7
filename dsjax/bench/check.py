"""Whether a timed result is right: its distance from a reference's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.bench.quantized import Quantized
from dsjax.bench.rows import Row, described

LARGEST_ERROR = 0.03  # a few times what rounding to bfloat16 on the way costs


def checked[Kind: str, Shape](
    row: Row[Kind, Shape], found: Any, reference: Callable[[], Any]
) -> Row[Kind, Shape]:
    """The row with its error; failed where that is large or not known."""
    try:
        error = relative_error(found, reference())
    except Exception as problem:  # the timing still counts
        return noted(row, f"not checked: {described(problem)}", failed=True)
    if not math.isfinite(error):
        return noted(row, "the result is not finite", failed=True)
    row = dataclasses.replace(row, error=error)
    return row if error <= LARGEST_ERROR else noted(row, "the result is wrong", failed=True)


def noted[Kind: str, Shape](
    row: Row[Kind, Shape], note: str, *, failed: bool = False
) -> Row[Kind, Shape]:
    return dataclasses.replace(row, note="; ".join(filter(None, [row.note, note])), failed=failed)


def relative_error(found: Any, wanted: Any) -> float:
    """Frobenius norm of the difference over that of the wanted array, the largest of several's.

    Quantised values count times their scales.
    """
    pairs = zip(_arrays(found), _arrays(wanted), strict=True)
    errors = [float(_error(x, y)) for x, y in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _arrays(found: Any) -> list[jax.Array | Quantized]:
    return jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, Quantized))


@jax.jit
def _error(x: jax.Array | Quantized, y: jax.Array | Quantized) -> jax.Array:
    x, y = _numbers(x), _numbers(y)
    return jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), jnp.finfo(jnp.float32).tiny)


def _numbers(x: jax.Array | Quantized) -> jax.Array:
    values = x.numbers() if isinstance(x, Quantized) else x
    return values.astype(jnp.float32).ravel()
