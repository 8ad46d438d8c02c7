"""The timed calls: operands of each kind, the kernel's API on them, and what XLA makes of them."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from dsjax.bench.shapes import BLOCK, Kind, Shape
from pallas_kernels.bf16_gemm import bf16_gemm, bf16_grouped_gemm
from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm, fp8_masked_gemm
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.quantize import dequantize, quantize_blocks, quantize_tiles

CHECKED_ROWS = 1024


class Operands(NamedTuple):
    """What one call reads.

    Scales of single rows are stored as the kernels read them, transposed, and `call` passes their
    transpose: inside jit the two transpositions cancel and no copy is timed.
    """

    a: Float[Array, "*groups m k"]
    b: Float[Array, "*groups n k"]
    a_scale: Float[Array, "k_blocks rows"] | None = None
    b_scale: Float[Array, "..."] | None = None
    sizes: Int32[Array, " groups"] | None = None


@functools.partial(jax.jit, static_argnames=("kind", "shape"))
def make(key: PRNGKeyArray, kind: Kind, shape: Shape) -> Operands:
    """Normal bfloat16 values, quantised; every group has all its M rows."""
    groups = (shape.groups,) if shape.groups else ()
    keys = jax.random.split(key)
    a = jax.random.normal(keys[0], (math.prod(groups) * shape.m, shape.k), jnp.bfloat16)
    b = jax.random.normal(keys[1], (*groups, shape.n, shape.k), jnp.bfloat16)
    sizes = jnp.full(groups, shape.m, jnp.int32) if groups else None
    if kind == "bf16":
        return Operands(a, b, sizes=sizes)
    q, scale = quantize_tiles(a)
    if kind == "wgrad":
        b_q, b_scale = quantize_tiles(b)
        return Operands(q, b_q, scale.T, b_scale.T)
    if kind == "masked":
        q = q.reshape(*groups, shape.m, shape.k)
    b_q, b_scale = quantize_blocks(b)
    return Operands(q, b_q, scale.T, b_scale, sizes)


def call(kind: Kind, x: Operands) -> Float[Array, "*groups m n"]:
    """The product of that kind on operands that `make` gave."""
    if x.a_scale is None or x.b_scale is None:
        return bf16_gemm(x.a, x.b) if x.sizes is None else bf16_grouped_gemm(x.a, x.b, x.sizes)
    a_scale = x.a_scale.T.reshape(*x.a.shape[:-1], -1)
    if kind == "wgrad":
        return fp8_wgrad(x.a, a_scale, x.b, x.b_scale.T)
    if x.sizes is None:
        return fp8_gemm(x.a, a_scale, x.b, x.b_scale)
    product = fp8_masked_gemm if kind == "masked" else fp8_grouped_gemm
    return product(x.a, a_scale, x.b, x.b_scale, x.sizes)


def xla(x: Operands) -> Float[Array, "m n"]:
    """XLA's own matmul of the stored values without scales: cuBLASLt's on a card, FP8 or BF16."""
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.a, x.b, contract, preferred_element_type=jnp.bfloat16)


def relative_error(
    kind: Kind, shape: Shape, x: Operands, out: Float[Array, "*groups m n"]
) -> float:
    """Frobenius norm of the output less a float32 product of the dequantised operands, over its
    norm; a block of rows at a time.
    """
    wrong = whole = 0.0
    for group in range(max(shape.groups, 1)):
        for start in range(0, shape.m, CHECKED_ROWS):
            height = min(CHECKED_ROWS, shape.m - start)
            parts = _squares(x, out, group, start, kind=kind, shape=shape, height=height)
            wrong, whole = wrong + float(parts[0]), whole + float(parts[1])
    return math.sqrt(wrong / whole) if whole else math.nan


@functools.partial(jax.jit, static_argnames=("kind", "shape", "height"))
def _squares(
    x: Operands, out: jax.Array, group: int, start: int, *, kind: Kind, shape: Shape, height: int
) -> tuple[jax.Array, jax.Array]:
    """Sums of squares of the errors and of the reference, over some rows of a group."""

    def rows(values: jax.Array) -> jax.Array:
        first = group * shape.m + start
        return jax.lax.dynamic_slice_in_dim(values.reshape(-1, values.shape[-1]), first, height)

    def matrix(values: jax.Array) -> jax.Array:
        return values.reshape(-1, *values.shape[-2:])[group]

    a, b = rows(x.a), matrix(x.b)
    if x.a_scale is None or x.b_scale is None:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    else:
        a = dequantize(a, rows(x.a_scale.T), jnp.float32, block_rows=1)
        b_scale = matrix(x.b_scale)
        b = (
            dequantize(b, b_scale.T, jnp.float32, block_rows=1) if kind == "wgrad"
            else dequantize(b, b_scale, jnp.float32, block_rows=BLOCK)
        )  # fmt: skip
    reference = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    error = rows(out).astype(jnp.float32) - reference
    return jnp.sum(error * error), jnp.sum(reference * reference)
