"""The Hopper kernels behind the public GEMMs: operands as callers have them, made to fit.

TMA wants row strides of 16 bytes and tiles of 8 rows and 128 bytes. Operands whose shapes keep to
that (K in blocks of 128 bytes, M and N multiples of 8) go in as they are; others are padded with
zeros first, which copies them once. So does cutting the output to an N that is not whole lines of
128 bytes. A's scales are read block of K by block of K, so they go in transposed: a scale that
`quantize_tiles` wrote that way costs nothing inside one `jit`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import sm90_bf16_wgrad, sm90_tiles
from pallas_kernels.sm90_bf16_gemm import bf16_gemm
from pallas_kernels.sm90_fp8_gemm import BLOCK, fp8_gemm, fp8_gemm_beside
from pallas_kernels.sm90_tiles import SMS
from pallas_kernels.sm90_traffic import Traffic


def _pad(x: jax.Array, **to: int) -> jax.Array:
    """Zeros up to the given sizes, by axis name from the back: `cols`, `rows`."""
    sizes = list(x.shape)
    for name, size in to.items():
        sizes[{"cols": -1, "rows": -2}[name]] = size
    if tuple(sizes) == x.shape:
        return x
    return jnp.pad(x, [(0, new - old) for new, old in zip(sizes, x.shape, strict=True)])


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _rows(m: int) -> int:
    """M as the kernels are compiled for: few sizes where serving batches vary, eights above.

    Up to 8 rows and the sizes themselves need no copy of A.
    """
    if m <= 8:
        return m
    if m <= 128:
        return 1 << (m - 1).bit_length()
    return _up(m, 64 if m <= 1024 else 8)


def _spread(rows: int, blocks: int) -> int:
    """Rows of A for a tile of so many blocks of K: few are made up to 64 where K is long.

    All SMs read the same few lines of L2 at once: on an H200 8 rows of 7168 x 16384 took 48 us,
    64 rows 32 us.
    """
    return max(rows, 64) if blocks >= 64 else rows


def _row_scales(scale: jax.Array, rows: int) -> jax.Array:
    """[M, K / 128] -> [K / 128, rows], rows a multiple of 4: 16 bytes."""
    return _pad(scale.T, cols=_up(rows, 4))


@functools.partial(jax.jit, static_argnums=(4, 5))
def fp8_dense(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, out_dtype: Any,
    sum_bits: int | None = None,
) -> jax.Array:  # fmt: skip
    (m, k), n = a.shape, b.shape[0]
    rows, depth = _rows(m), _up(k, BLOCK)
    tile = replace(sm90_tiles.dense(rows, n, depth // BLOCK), sum_bits=sum_bits)
    rows = _spread(rows, depth // BLOCK // tile.splits)
    split = tile.splits > 1
    out = fp8_gemm(
        _pad(a, rows=rows, cols=depth)[None], _row_scales(a_scale, rows),
        _pad(b, cols=depth)[None], b_scale[None], None,
        kind="dense", tile=tile, out_dtype=jnp.float32 if split else out_dtype, sms=SMS,
    )  # fmt: skip
    out = out.sum(0).astype(out_dtype) if split else out[0]
    return out[:m, :n]


def fp8_dense_beside(
    traffic: Traffic, a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array,
    out_dtype: Any, sum_bits: int | None = None,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    """`fp8_dense` of more than 128 rows on the SMs that the traffic leaves, and what it gives."""
    (m, k), n, sms = a.shape, b.shape[0], SMS - traffic.ctas
    rows, depth = _rows(m), _up(k, BLOCK)
    tile = replace(sm90_tiles.dense(rows, n, depth // BLOCK, sms), sum_bits=sum_bits)
    out, moved = fp8_gemm_beside(
        traffic, _pad(a, rows=rows, cols=depth)[None], _row_scales(a_scale, rows),
        _pad(b, cols=depth)[None], b_scale[None], tile=tile, out_dtype=out_dtype, sms=sms,
    )  # fmt: skip
    return out[0, :m, :n], moved


@functools.partial(jax.jit, static_argnums=(5, 6))
def fp8_grouped(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, sizes: jax.Array,
    out_dtype: Any, sum_bits: int | None = None,
) -> jax.Array:  # fmt: skip
    (m, k), (groups, n, _) = a.shape, b.shape
    rows, depth = _rows(m), _up(k, BLOCK)
    tile = replace(sm90_tiles.grouped(rows, n, depth // BLOCK, groups), sum_bits=sum_bits)
    out = fp8_gemm(
        _pad(a, rows=rows, cols=depth)[None], _row_scales(a_scale, rows),
        _pad(b, cols=depth), b_scale, sizes,
        kind="grouped", tile=tile, out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[0, :m, :n]


@functools.partial(jax.jit, static_argnums=5)
def fp8_masked(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, counts: jax.Array,
    out_dtype: Any,
) -> jax.Array:  # fmt: skip
    (groups, m, k), n = a.shape, b.shape[1]
    rows, depth = _rows(m), _up(k, BLOCK)
    scales = _pad(a_scale, rows=rows).reshape(groups * rows, -1)
    out = fp8_gemm(
        _pad(a, rows=rows, cols=depth), _row_scales(scales, groups * rows),
        _pad(b, cols=depth), b_scale, counts,
        kind="masked", tile=sm90_tiles.masked(rows, n, depth // BLOCK, groups),
        out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[:, :m, :n]


@functools.partial(jax.jit, static_argnums=(5, 6))
def fp8_wgrad(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array,
    accumulate: jax.Array | None, out_dtype: Any, sum_bits: int | None = None,
) -> jax.Array:  # fmt: skip
    (m, k), n = a.shape, b.shape[0]
    rows, depth = _rows(m), _up(k, BLOCK)
    cols = _up(n, 8)
    out = fp8_gemm(
        _pad(a, rows=rows, cols=depth)[None], _row_scales(a_scale, rows),
        _pad(b, rows=cols, cols=depth)[None], _row_scales(b_scale, cols), None, _init(accumulate),
        kind="dense", tile=replace(sm90_tiles.BY_ROW, sum_bits=sum_bits),
        out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[0, :m, :n]


def fp8_wgrad_beside(
    traffic: Traffic, a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array,
    out_dtype: Any, sum_bits: int | None = None,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    """`fp8_wgrad` on the SMs that the traffic leaves, and what it gives."""
    (m, k), n = a.shape, b.shape[0]
    rows, cols, depth = _rows(m), _up(n, 8), _up(k, BLOCK)
    out, moved = fp8_gemm_beside(
        traffic, _pad(a, rows=rows, cols=depth)[None], _row_scales(a_scale, rows),
        _pad(b, rows=cols, cols=depth)[None], _row_scales(b_scale, cols),
        tile=replace(sm90_tiles.BY_ROW, sum_bits=sum_bits), out_dtype=out_dtype,
        sms=SMS - traffic.ctas,
    )  # fmt: skip
    return out[0, :m, :n], moved


@functools.partial(jax.jit, static_argnums=(6, 7))
def fp8_grouped_wgrad(
    a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, sizes: jax.Array,
    accumulate: jax.Array | None, out_dtype: Any, sum_bits: int | None = None,
) -> jax.Array:  # fmt: skip
    m, n = a.shape[0], b.shape[0]
    rows, cols = _rows(m), _up(n, 8)
    out = fp8_gemm(
        _pad(a, rows=rows)[None], _row_scales(a_scale, rows),
        _pad(b, rows=cols)[None], _row_scales(b_scale, cols), sizes, _init(accumulate),
        kind="k_grouped", tile=replace(sm90_tiles.BY_ROW, sum_bits=sum_bits),
        out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[:, :m, :n]


def _init(accumulate: jax.Array | None) -> jax.Array | None:
    """[groups, M, N] or [M, N] in whole tiles: those that are not cost a copy."""
    if accumulate is None:
        return None
    tile = sm90_tiles.BY_ROW
    rows, cols = _up(accumulate.shape[-2], tile.height), _up(accumulate.shape[-1], tile.width)
    return _pad(accumulate, rows=rows, cols=cols).reshape(-1, rows, cols)


@functools.partial(jax.jit, static_argnums=2)
def bf16_dense(a: jax.Array, b: jax.Array, out_dtype: Any) -> jax.Array:
    (m, k), n = a.shape, b.shape[0]
    rows, cols, depth = _rows(m), _up(n, 8), _up(k, 64)
    out = bf16_gemm(
        _pad(a, rows=rows, cols=depth)[None], _pad(b, rows=cols, cols=depth)[None], None,
        kind="dense", tile=sm90_tiles.bf16(rows, cols, 1), out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[0, :m, :n]


@functools.partial(jax.jit, static_argnums=3)
def bf16_grouped(a: jax.Array, b: jax.Array, sizes: jax.Array, out_dtype: Any) -> jax.Array:
    cols, depth = _up(b.shape[1], 8), _up(b.shape[2], 64)
    padded = _pad(b, rows=cols, cols=depth)
    return _bf16_grouped(a, padded, sizes, out_dtype, cols, depth, False)[:, : b.shape[1]]


@functools.partial(jax.jit, static_argnums=3)
def bf16_grouped_by_k(a: jax.Array, b: jax.Array, sizes: jax.Array, out_dtype: Any) -> jax.Array:
    """b is [G, K, N]."""
    depth, cols = _up(b.shape[1], 64), _up(b.shape[2], 64)
    padded = _pad(b, rows=depth, cols=cols)
    return _bf16_grouped(a, padded, sizes, out_dtype, cols, depth, True)[:, : b.shape[2]]


def _bf16_grouped(
    a: jax.Array, b: jax.Array, sizes: jax.Array, out_dtype: Any, cols: int, depth: int,
    b_by_k: bool,
) -> jax.Array:  # fmt: skip
    m, groups = a.shape[0], b.shape[0]
    rows = _rows(m)
    out = bf16_gemm(
        _pad(a, rows=rows, cols=depth)[None], b, sizes, kind="grouped",
        tile=sm90_tiles.bf16(-(-rows // groups), cols, groups), out_dtype=out_dtype,
        b_by_k=b_by_k, sms=SMS,
    )  # fmt: skip
    return out[0, :m]


@functools.partial(jax.jit, static_argnums=3)
def bf16_masked(a: jax.Array, b: jax.Array, counts: jax.Array, out_dtype: Any) -> jax.Array:
    (groups, m, k), n = a.shape, b.shape[1]
    rows, cols, depth = _rows(m), _up(n, 8), _up(k, 64)
    out = bf16_gemm(
        _pad(a, rows=rows, cols=depth), _pad(b, rows=cols, cols=depth), counts,
        kind="masked", tile=sm90_tiles.bf16(rows, cols, groups), out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[:, :m, :n]


@functools.partial(jax.jit, static_argnums=3)
def bf16_grouped_wgrad(x: jax.Array, dy: jax.Array, sizes: jax.Array, out_dtype: Any) -> jax.Array:
    (t, k), n = x.shape, dy.shape[1]
    rows, depth, cols = _up(t, 8), _up(k, 64), _up(n, 64)
    out = sm90_bf16_wgrad.bf16_grouped_wgrad(
        _pad(x, rows=rows, cols=depth), _pad(dy, rows=rows, cols=cols), sizes,
        tile=sm90_tiles.BF16_WGRAD, out_dtype=out_dtype, sms=SMS,
    )  # fmt: skip
    return out[:, :k, :n]
