"""Weighted sums of rows on Hopper: what takes the results of experts back to their tokens.

All rows of a token are on their way to registers at once, which keeps memory busy without any
shared memory. Their numbers are read a token ahead.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import ceil_div
from pallas_kernels.lowered_once import lowered_once

THREADS, VECTOR = 128, 8  # the latter: bfloat16 in 16 bytes
AT_ONCE, TOGETHER = 12 << 10, 4  # elements on their way to a CTA; pieces of tokens it sums up
Scalar = Any


@lowered_once
def combine(
    y: jax.Array, slots: jax.Array, weights: jax.Array | None, *, at_once: int = AT_ONCE,
    together: int = TOGETHER, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`combine_rows` of operands that are not empty, rows of y being multiples of 128.

    A CTA has up to `at_once` elements on their way, and `together` pieces of tokens one by one.
    """
    (tokens, choices), (height, width) = slots.shape, y.shape
    piece = _piece(width, at_once // choices)
    pieces, layout = width // piece, plgpu.Layout.WG_STRIDED((piece,), _vector(width))
    total, weighted = tokens * pieces, weights is not None

    def kernel(y_ref: Any, slots_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        def look(unit: Scalar) -> tuple[list[Scalar], list[Scalar]]:
            token = lax.div(lax.min(unit, jnp.int32(total - 1)), jnp.int32(pieces))
            rows = [slots_ref[token, j] for j in range(choices)]
            return rows, [weights_ref[token, j] for j in range(choices)] if weighted else []

        def add(unit: Scalar, rows: list[Scalar], by: list[Scalar]) -> None:
            columns = pl.ds(lax.rem(unit, jnp.int32(pieces)) * piece, piece)
            inside = [lax.clamp(jnp.int32(0), row, jnp.int32(height - 1)) for row in rows]
            loaded = [
                plgpu.load(y_ref.at[row, columns], layout=layout, optimized=False) for row in inside
            ]
            parts = [part.astype(jnp.float32) for part in loaded]
            if weighted:
                parts = [part * weight for part, weight in zip(parts, by, strict=True)]
            out = out_ref.at[lax.div(unit, jnp.int32(pieces)), columns]
            out[...] = functools.reduce(jnp.add, parts).astype(out_ref.dtype)

        def step(i: Scalar, found: Any) -> Any:
            unit = lax.axis_index("cta") * together + i
            coming = look(unit + 1)
            pl.when(unit < total)(functools.partial(add, unit, *found))
            return coming

        lax.fori_loop(0, together, step, look(lax.axis_index("cta") * together))

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((tokens, width), y.dtype),
        grid=(ceil_div(total, together),), grid_names=("cta",), kernel_name="combine_rows",
        interpret=interpret, compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(y, slots, weights if weighted else slots)  # fmt: skip


def _vector(width: int) -> int:
    """Elements that a thread loads at once."""
    return math.gcd(width // THREADS, VECTOR)


def _piece(width: int, most: int) -> int:
    """The widest piece of a row up to `most`, or else one vector a thread."""
    least = THREADS * _vector(width)
    fitting = (n for n in range(1, width // least + 1) if width // least % n == 0)
    return least * max((n for n in fitting if n * least <= most), default=1)
