"""The FP8 and BF16 products in plain jnp: float32 throughout, any device, sm90_gemm's oracle.

Grouped products copy each group to whole blocks of rows, zeros behind its last one, and loop over
the blocks: memory grows with rows plus groups, never with rows times groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.checks import BLOCK, FRACTION_BITS, ceil_div

ROWS = 64  # a block's, in products that have their groups in the rows

typed = functools.partial(jax.jit, static_argnames="out_dtype")
typed_fp8 = functools.partial(jax.jit, static_argnames=("out_dtype", "sum_bits"))


@typed_fp8
def fp8_dense(
    a: Array, a_scale: Array, b: Array, b_scale: Array, out_dtype: DTypeLike,
    sum_bits: int | None = None,
) -> Array:  # fmt: skip
    b = dequantise(b, b_scale, BLOCK)
    return _dot(dequantise(a, a_scale), b, sum_bits).astype(out_dtype)


@typed_fp8
def fp8_grouped(
    a: Array, a_scale: Array, b: Array, b_scale: Array, group_sizes: Array, out_dtype: DTypeLike,
    sum_bits: int | None = None,
) -> Array:  # fmt: skip
    def matrix(group: Array) -> Array:
        return dequantise(b[group], b_scale[group], BLOCK)

    a = dequantise(a, a_scale)
    return _grouped(a, matrix, group_sizes, len(b), sum_bits).astype(out_dtype)


@typed
def fp8_masked(
    a: Array, a_scale: Array, b: Array, b_scale: Array, counts: Array, out_dtype: DTypeLike
) -> Array:
    out = lax.map(lambda group: fp8_dense(*group, out_dtype), (a, a_scale, b, b_scale))
    return _first_rows(out, counts)


@typed_fp8
def fp8_wgrad(
    a: Array, a_scale: Array, b: Array, b_scale: Array, accumulate: Array | None,
    out_dtype: DTypeLike, sum_bits: int | None = None,
) -> Array:  # fmt: skip
    out = _dot(dequantise(a, a_scale), dequantise(b, b_scale), sum_bits)
    return _plus(out, accumulate).astype(out_dtype)


@typed_fp8
def fp8_grouped_wgrad(
    a: Array, a_scale: Array, b: Array, b_scale: Array, group_sizes: Array,
    accumulate: Array | None, out_dtype: DTypeLike, sum_bits: int | None = None,
) -> Array:  # fmt: skip
    whole = ceil_div(group_sizes, BLOCK) * BLOCK
    x, y = dequantise(a, a_scale).T, dequantise(b, b_scale).T
    return _plus(_outer(x, y, whole, sum_bits), accumulate).astype(out_dtype)


@typed
def bf16_dense(a: Array, b: Array, out_dtype: DTypeLike) -> Array:
    return _dot(_float32(a), _float32(b)).astype(out_dtype)


@typed
def bf16_grouped(a: Array, b: Array, group_sizes: Array, out_dtype: DTypeLike) -> Array:
    out = _grouped(_float32(a), lambda group: _float32(b[group]), group_sizes, len(b))
    return out.astype(out_dtype)


@typed
def bf16_masked(a: Array, b: Array, counts: Array, out_dtype: DTypeLike) -> Array:
    out = lax.map(lambda group: bf16_dense(*group, out_dtype), (a, b))
    return _first_rows(out, counts)


@typed
def bf16_grouped_wgrad(x: Array, dy: Array, group_sizes: Array, out_dtype: DTypeLike) -> Array:
    return _outer(_float32(x), _float32(dy), group_sizes).astype(out_dtype)


def dequantise(q: Array, scale: Array, rows: int = 1) -> Array:
    """float32 of q [R, C], whose scale covers `rows` x 128 of it."""
    height, width = q.shape
    tall = jnp.repeat(scale, rows, axis=0)[:height]
    return _float32(q) * jnp.repeat(tall, BLOCK, axis=1)[:, :width]


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)


def keep_bits(sums: Array, bits: int | None) -> Array:
    """float32 sums cut to so many bits of their fractions, as an accumulator that has no more
    would; None keeps all 23."""
    if bits is None:
        return sums
    mask = np.int32(-(1 << (FRACTION_BITS - bits)))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(sums, jnp.int32) & mask, jnp.float32)


def _dot(a: Array, b: Array, sum_bits: int | None = None) -> Array:
    """a @ b.T, its sums cut to `sum_bits` behind every block of K."""
    exact = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    if sum_bits is None:
        return exact(a, b.T)
    total = jnp.zeros((len(a), len(b)), jnp.float32)
    for start in range(0, a.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        total = keep_bits(total + exact(a[:, block], b[:, block].T), sum_bits)
    return total


def _plus(out: Array, accumulate: Array | None) -> Array:
    return out if accumulate is None else accumulate + out


def _first_rows(out: Array, counts: Array) -> Array:
    valid = jnp.arange(out.shape[1]) < counts[:, None]
    return jnp.where(valid[..., None], out, 0)


def _blocked(sizes: Array, m: int, rows: int) -> tuple[Array, Array]:
    """(each row's place in whole blocks, each block's group); m rows sorted by group.

    Rows behind the groups have their place, and blocks their group, one past the last.
    """
    count = min(m, ceil_div(m, rows) + len(sizes))
    blocks = ceil_div(sizes, rows)
    block_end, end = jnp.cumsum(blocks), jnp.cumsum(sizes)
    row = jnp.arange(m)
    group = jnp.searchsorted(end, row, side="right")
    place = row - (end - sizes)[group] + (block_end - blocks)[group] * rows
    owner = jnp.searchsorted(block_end, jnp.arange(count), side="right")
    return jnp.where(row < end[-1], place, count * rows), owner


def _to_blocks(x: Array, place: Array, count: int, rows: int) -> Array:
    padded = jnp.zeros((count * rows, x.shape[1]), x.dtype).at[place].set(x, mode="drop")
    return padded.reshape(count, rows, x.shape[1])


def _grouped(
    a: Array, matrix: Callable[[Array], Array], sizes: Array, groups: int,
    sum_bits: int | None = None,
) -> Array:  # fmt: skip
    """Each group's rows of a [M, K] times its matrix(group) [N, K]; zeros behind the groups."""
    place, owner = _blocked(sizes, len(a), ROWS)
    blocks = _to_blocks(a, place, len(owner), ROWS)

    def product(block: tuple) -> Array:
        return _dot(block[0], matrix(jnp.minimum(block[1], groups - 1)), sum_bits)

    out = lax.map(product, (blocks, owner))
    return out.reshape(-1, out.shape[-1]).at[place].get(mode="fill", fill_value=0)


def _outer(x: Array, y: Array, sizes: Array, sum_bits: int | None = None) -> Array:
    """x_g.T @ y_g of every group's rows of x [T, K] and y [T, N]: [G, K, N]."""
    place, owner = _blocked(sizes, len(x), BLOCK)
    xs, ys = (_to_blocks(rows, place, len(owner), BLOCK) for rows in (x, y))

    def add(total: Array, block: tuple) -> tuple[Array, None]:
        x_block, y_block, group = block
        added = keep_bits(total[group] + _dot(x_block.T, y_block.T), sum_bits)
        return total.at[group].set(added, mode="drop"), None

    zeros = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), jnp.float32)
    return lax.scan(add, zeros, (xs, ys, owner))[0]
