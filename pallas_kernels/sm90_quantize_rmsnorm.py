"""RMS norm and quantisation of its result on Hopper, with every row read from memory once.

The walk is that of `sm90_quantize`, over a few whole rows at a time: the first pass over them in
shared memory adds up the squares, the second scales, weights and quantises. Half a warp holds a
tile of 128 columns, a whole one two of a row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE, scale_of
from pallas_kernels.sm90_quantize import launch, stream
from pallas_kernels.sm90_tile import keep_row_major

ROWS, TILES, PIECE = 2, 4, 8  # the layout's unit: 2 rows by 4 tiles, 8 elements a thread
PART = plgpu.Layout.TILED(  # of [rows, tiles, 128]
    plgpu.Tiling(((ROWS, TILES, TILE), (2, TILE), (PIECE,))), (-6, -5), (-3, -2), -1
)
STAGE_BYTES, MOST_BYTES = 32 << 10, 96 << 10  # of x in shared memory: aimed at, and for two stages
HELD = 64  # elements a thread holds at a time


@lowered_once
def rmsnorm(
    x: jax.Array, weight: jax.Array, *, eps: float, power_of_two: bool, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`rmsnorm_quantize` of x [M, K], K % 16 == 0; K % 128 != 0 costs a copy."""
    m, k = x.shape
    cols = ceil_div(k, TILE)
    padded = ceil_div(cols, TILES) * TILES
    x = jnp.pad(x, ((0, 0), (0, cols * TILE - k))).reshape(m, cols, TILE)
    weight = jnp.pad(weight, (0, padded * TILE - k)).reshape(padded, TILE)
    rows, part = _cut(m, padded, x.dtype.itemsize)
    units = ceil_div(m, rows)
    stages = 2 if rows * padded * TILE * x.dtype.itemsize <= MOST_BYTES else 1

    def body(x_ref, weight_ref, q_ref, scale_ref, x_s, q_s, full):
        def locate(unit, cursor):
            return unit * rows, cursor

        def fetch(row, slot):
            plgpu.copy_gmem_to_smem(
                x_ref.at[pl.ds(row, rows), pl.ds(0, padded)], x_s.at[slot], full.at[slot]
            )

        def read(slot, tiles):
            return plgpu.load(x_s.at[slot, :, tiles], layout=PART, optimized=False).astype(
                jnp.float32
            )

        def work(row, slot, refill):
            plgpu.barrier_wait(full.at[slot])

            def add(i, squares):
                values = read(slot, pl.ds(i * part, part))
                return squares + values * values

            zeros = plgpu.layout_cast(jnp.zeros((rows, part, TILE), jnp.float32), PART)
            squares = lax.fori_loop(0, padded // part, add, zeros)
            norm = lax.rsqrt(jnp.sum(jnp.sum(squares, axis=2), axis=1) * (1 / k) + eps)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def quantize(i, _):
                tiles = pl.ds(i * part, part)
                values = read(slot, tiles) * lax.broadcast_in_dim(norm, zeros.shape, [0])
                weights = plgpu.load(weight_ref.at[tiles], layout=PART.reduce(0), optimized=False)
                values *= lax.broadcast_in_dim(weights.astype(jnp.float32), zeros.shape, [1, 2])
                scale = scale_of(jnp.max(jnp.abs(values), axis=2), power_of_two)
                values *= lax.broadcast_in_dim(1 / scale, zeros.shape, [0, 1])
                q_s[:, tiles] = values.astype(E4M3)
                scale_ref.at[tiles, pl.ds(row, rows)].T[...] = scale

            lax.fori_loop(0, padded // part, quantize, None)
            refill()
            plgpu.copy_smem_to_gmem(q_s, q_ref.at[pl.ds(row, rows), pl.ds(0, padded)])

        if interpret is None:
            keep_row_major(x_s, q_s)
        stream(units, stages, fetch, work, locate)

    q, scale = launch(
        body, x, weight, name="rmsnorm_quantize", units=units, sms=sms, interpret=interpret,
        most_ctas=3,
        out=[
            jax.ShapeDtypeStruct(x.shape, E4M3),
            jax.ShapeDtypeStruct((padded, units * rows), jnp.float32),
        ],
        smem=dict(
            x_s=((stages, rows, padded, TILE), x.dtype), q_s=((rows, padded, TILE), E4M3)
        ),
        full=plgpu.Barrier(num_barriers=stages),
    )  # fmt: skip
    return q.reshape(m, -1)[:, :k], scale[:cols, :m].T


def _cut(m: int, tiles: int, itemsize: int) -> tuple[int, int]:
    """Rows of a unit, and how many of their `tiles` are worked on at a time."""
    rows = min(STAGE_BYTES // (tiles * TILE * itemsize), HELD // TILES, m)
    rows = max(ROWS, rows // ROWS * ROWS)
    fitting = (part for part in range(TILES, HELD // rows + 1, TILES) if tiles % part == 0)
    return rows, max(fitting)
