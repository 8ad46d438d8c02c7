"""Quantisation in 128 x 128 blocks on Hopper, with the transposed matrix from the same read.

The walk over tiles is that of `sm90_quantize`. Both products that a weight enters want their summed
axis contiguous in FP8; a block has one scale either way round, so its transpose is made of the
values already cast, out of shared memory.
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
from pallas_kernels.quantize import TILE
from pallas_kernels.sm90_quantize import (
    STAGE_BYTES,
    Scalar,
    count_from,
    launch,
    quantize_rows,
    rows_layout,
    stages_of,
    store_rows,
    stream,
    write_tile,
)
from pallas_kernels.sm90_quantize_transposed import load_columns
from pallas_kernels.sm90_tile import keep_row_major

Place = tuple[Scalar, Scalar, Scalar]  # group, tile of rows, tile of columns


@lowered_once
def blocks(
    w: jax.Array, *, power_of_two: bool, transposed: bool = False, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """`quantize_blocks` of w [G, N, K], K % 16 == 0; with `transposed` q's transpose too, where
    N % 16 == 0."""
    groups, n, k = w.shape
    rows, cols = ceil_div(n, TILE), ceil_div(k, TILE)
    layout = rows_layout(w.dtype)

    def body(w_ref, q_ref, scale_ref, *more, x_s, q_s, line_s, full, **spare):
        def locate(unit, cursor):
            row = lax.div(unit, jnp.int32(cols))
            group = lax.div(row, jnp.int32(rows))
            return (group, row - group * rows, lax.rem(unit, jnp.int32(cols))), cursor

        def fetch(place, slot):
            group, row, col = place
            source = w_ref.at[group, pl.ds(row * TILE, TILE), pl.ds(col * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, x_s.at[slot], full.at[slot])

        def work(place, slot, refill):
            plgpu.barrier_wait(full.at[slot])
            x = plgpu.load(x_s.at[slot], layout=layout)
            refill()
            q, scale = quantize_rows(x, line_s, layout, power_of_two, alike=True)
            group, row, col = place
            write_tile(q, q_s)
            store_rows(q_s, count_from(row * TILE, n), q_ref.at[group], row * TILE, col)
            line_s[0] = scale
            scale_ref[place] = line_s[0, 0]
            if transposed:
                q_t_s = spare["q_t_s"]
                q_t_s[...] = load_columns(q_s)
                plgpu.commit_smem()
                store_rows(q_t_s, count_from(col * TILE, k), more[0].at[group], col * TILE, row)

        if interpret is None:
            keep_row_major(x_s, q_s, *spare.values())
        stream(units, stages, fetch, work, locate)

    units = groups * rows * cols
    stages = stages_of(w.dtype.itemsize, STAGE_BYTES)
    smem: dict[str, tuple[tuple[int, ...], Any]] = dict(
        x_s=((stages, TILE, TILE), w.dtype), q_s=((TILE, TILE), E4M3),
        line_s=((2, TILE), jnp.float32),
    )  # fmt: skip
    out = [
        jax.ShapeDtypeStruct(w.shape, E4M3),
        jax.ShapeDtypeStruct((groups, rows, cols), jnp.float32),
    ]
    if transposed:
        smem["q_t_s"] = ((TILE, TILE), E4M3)
        out.append(jax.ShapeDtypeStruct((groups, k, n), E4M3))
    return launch(
        body, w, name="quantize_blocks", units=units, sms=sms, interpret=interpret, out=out,
        smem=smem, full=plgpu.Barrier(num_barriers=stages),
    )  # fmt: skip
