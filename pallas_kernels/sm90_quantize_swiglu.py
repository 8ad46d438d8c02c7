"""SwiGLU's output and its input on Hopper, both quantised from one read of the input.

The walk is that of `sm90_quantize`, over the tiles of gate and up at the same place. A unit has 32
rows: the scales of its three tiles are then one a thread, and three CTAs share an SM.
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
from pallas_kernels.quantize import TILE, tile_scale
from pallas_kernels.sm90_quantize import LINE, launch, rows_layout, silu_times, stream
from pallas_kernels.sm90_tile import keep_row_major

ROWS, STAGES, CTAS = 32, 2, 3
Pair = tuple[jax.Array, jax.Array]  # values and scales


@lowered_once
def swiglu_both(
    gate_up: jax.Array, used: jax.Array | None = None, *, power_of_two: bool, rows: int = ROWS,
    stages: int = STAGES, most_ctas: int = CTAS, sms: int | None = None, interpret: Any = None,
) -> tuple[Pair, Pair]:  # fmt: skip
    """`swiglu_quantize_both` of gate_up [M, 2F], F % 128 == 0. A unit has 8, 16, 24 or 32 rows.

    Of used [1], int32, rows if given; others are left as they are, but for some of the last unit.
    """
    m, f = gate_up.shape[0], gate_up.shape[1] // 2
    cols, units_down = f // TILE, ceil_div(m, rows)
    layout = rows_layout(gate_up.dtype)

    def body(*refs: Any, x_s, q_s, h_q_s, line_s, scale_s, full):
        x_ref, *counted, h_q_ref, h_scale_ref, q_ref, scale_ref = refs
        down = units_down
        if counted:
            down = lax.min(lax.div(counted[0][0] + (rows - 1), jnp.int32(rows)), units_down)

        def locate(unit, cursor):
            return (lax.div(unit, jnp.int32(cols)) * rows, lax.rem(unit, jnp.int32(cols))), cursor

        def fetch(place, slot):
            row, col = place
            source = x_ref.at[pl.ds(row, rows), :, pl.ds(col * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, x_s.at[slot], full.at[slot])

        def work(place, slot, refill):
            plgpu.barrier_wait(full.at[slot])
            gate, up = (plgpu.load(x_s.at[slot, :, i], layout=layout) for i in range(2))
            refill()
            tiles = gate, up, silu_times(gate, up)
            scale = _inverses(tiles, line_s, power_of_two)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scale_s[...] = scale
            for i, x in enumerate(tiles):
                line = plgpu.load(_part(line_s, i, rows), layout=layout.reduce(1))
                scaled = x.astype(jnp.float32) * lax.broadcast_in_dim(line, x.shape, [0])
                out = h_q_s if i == 2 else q_s.at[:, i]
                out[...] = scaled.astype(E4M3)
            plgpu.commit_smem()
            store(*place)

        def store(row, col):
            at, across = pl.ds(row, rows), pl.ds(col * TILE, TILE)
            plgpu.copy_smem_to_gmem(q_s, q_ref.at[at, :, across])
            plgpu.copy_smem_to_gmem(h_q_s, h_q_ref.at[at, across])
            lines = scale_ref.at[col], scale_ref.at[cols + col], h_scale_ref.at[col]
            for i, line in enumerate(lines):
                plgpu.copy_smem_to_gmem(_part(scale_s, i, rows), line.at[at])

        if interpret is None:
            keep_row_major(x_s, q_s, h_q_s)
        stream(down * cols, stages, fetch, work, locate)

    h_q, h_scale, q, scale = launch(
        body, gate_up.reshape(m, 2, f), *([] if used is None else [used]),
        name="swiglu_quantize_both", units=units_down * cols, sms=sms, interpret=interpret,
        most_ctas=most_ctas,
        out=[
            jax.ShapeDtypeStruct((m, f), E4M3),
            jax.ShapeDtypeStruct((cols, units_down * rows), jnp.float32),
            jax.ShapeDtypeStruct((m, 2, f), E4M3),
            jax.ShapeDtypeStruct((2 * cols, units_down * rows), jnp.float32),
        ],
        smem=dict(
            x_s=((stages, rows, 2, TILE), gate_up.dtype), q_s=((rows, 2, TILE), E4M3),
            h_q_s=((rows, TILE), E4M3), line_s=((TILE,), jnp.float32),
            scale_s=((TILE,), jnp.float32),
        ),
        full=plgpu.Barrier(num_barriers=stages),
    )  # fmt: skip
    return (h_q, h_scale[:, :m].T), (q.reshape(m, 2 * f), scale[:, :m].T)


def _inverses(tiles: tuple[jax.Array, ...], line_s: Any, power_of_two: bool) -> jax.Array:
    """The tiles' scales side by side, one a thread; their inverses are in line_s."""
    for i, x in enumerate(tiles):
        amax = jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)
        _part(line_s, i, len(x))[...] = amax
    scale, inverse = tile_scale(plgpu.load(line_s, layout=LINE), power_of_two)
    line_s[...] = inverse
    return scale


def _part(line_s: Any, i: int, rows: int) -> Any:
    return line_s.at[pl.ds(i * rows, rows)]
