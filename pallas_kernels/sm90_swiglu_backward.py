"""SwiGLU's backward pass on Hopper, its results cast along both axes as they are made.

The walk is that of `sm90_quantize_transposed`: tiles of 128 rows and 128 columns, here of gate, up
and h at the same place. A tile is fetched and computed in slabs of a few rows, for which a thread
has registers; the values, cast along the rows, gather in shared memory, leave from there, and are
turned there. Sums along a row are kept by tile and added up behind the kernel, always in the same
order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import E4M3
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE, tile_scale
from pallas_kernels.sm90_quantize import (
    LINE,
    Count,
    Scalar,
    launch,
    rows_layout,
    store_line,
    store_rows,
)
from pallas_kernels.sm90_quantize_transposed import (
    COLUMN,
    FLOATS,
    Place,
    Walk,
    clear_rows,
    load_columns,
    operands_of,
    own_scales,
    store_columns,
    stream_tiles,
)
from pallas_kernels.sm90_tile import keep_row_major

ROWS, STAGES = 16, 2  # of a slab; slabs on their way
CTAS = 3  # on an SM: a thread needs 165 registers
SPACE = 64  # floats of a slab, up to 3 before, to whole lines of 128 bytes
GATE, UP, H, SUMS = range(4)
Pair = tuple[jax.Array, jax.Array]  # values and scales


@lowered_once
def backward(
    q: jax.Array, scale: jax.Array, d_h: jax.Array, weights: jax.Array | None,
    sizes: jax.Array | None, *, rows: int = ROWS, stages: int = STAGES, most_ctas: int = CTAS,
    sms: int | None = None, interpret: Any = None,
) -> tuple[Pair, Pair, Pair, jax.Array | None]:  # fmt: skip
    """gate_up's gradient, its transpose, h's times the weights, and the weights' gradient [M].

    q [M, 2F] and scale are `quantize_tiles` of gate_up, d_h bfloat16 [M, F], F % 128 == 0. New
    scales are powers of two. A slab has 8, 16 or 32 rows.
    """
    m, f = d_h.shape
    walk = Walk(m, f, 0 if sizes is None else sizes.shape[0])
    wide = dataclasses.replace(walk, k=2 * f)
    weighted = weights is not None
    operands = [q.reshape(m, 2, f), _padded(scale.T), d_h]
    operands += [_padded(weights)] if weighted else []
    copies = len(operands) + 1  # gate's scales and up's

    def body(*refs, **scratch):
        taken, given = refs[: len(operands)], refs[len(operands) :]
        sizes_ref, given = given[: walk.groups > 0], given[walk.groups > 0 :]
        tiles = _Tiles(walk, wide, rows, taken, given, **scratch)
        if interpret is None:
            keep_row_major(tiles.q_s, tiles.d_h_s, tiles.tile_s)
        stream_tiles(walk, stages, tiles.fetch, tiles.work, sizes_ref, TILE // rows)

    out = [
        jax.ShapeDtypeStruct((m, 2 * f), E4M3),
        jax.ShapeDtypeStruct((wide.cols, m), jnp.float32),
        *wide.transposed,
        *walk.transposed,
    ]
    out += [jax.ShapeDtypeStruct((walk.cols, m), jnp.float32)] if weighted else []
    grad, grad_scale, grad_t, grad_t_scale, h_t, h_t_scale, *sums = launch(
        body, *operands, *operands_of(sizes), name="swiglu_backward", units=walk.units, sms=sms,
        interpret=interpret, out=out, most_ctas=most_ctas,
        smem=dict(
            q_s=((stages, rows, 2, TILE), E4M3), scale_s=((stages, 3, SPACE), jnp.float32),
            d_h_s=((stages, rows, TILE), d_h.dtype), tile_s=((3, TILE, TILE), E4M3),
            line_s=((4, TILE), jnp.float32), own_s=((TILE,), jnp.float32),
        ),
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    )  # fmt: skip
    return (
        (grad, grad_scale.T), (grad_t, grad_t_scale.T), (h_t, h_t_scale.T),
        sums[0].sum(axis=0) if weighted else None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """What happens to a tile; the methods are traced inside the kernel."""

    walk: Walk
    wide: Walk
    """Of gate_up's gradient: its tiles are those of gate, then those of up."""
    rows: int
    """Of a slab."""
    taken: tuple[Any, ...]
    """gate_up's cache and its scales, d_h and, if there are, weights."""
    given: tuple[Any, ...]
    """The gradient, its transpose and h's, each with scales, and sums if there are weights."""
    q_s: Any
    scale_s: Any
    d_h_s: Any
    tile_s: Any
    """Of gate's gradient, up's, and h: e4m3."""
    line_s: Any
    """Their rows' scales, and the rows' sums."""
    own_s: Any
    full: Any

    def slab(self, place: Any) -> tuple[Scalar, Scalar]:
        """Its first row, and how many rows before it are fetched of lines."""
        *_, start, _, slab = place
        row = lax.min(start + slab * self.rows, jnp.int32(self.walk.m))
        return row, lax.rem(row, jnp.int32(FLOATS))

    def fetch(self, place: Any, slot: Scalar) -> None:
        q_ref, scale_ref, d_h_ref, *weights_ref = self.taken
        col, (row, before) = place[1], self.slab(place)
        down, across = pl.ds(row, self.rows), pl.ds(col * TILE, TILE)
        lines = [scale_ref.at[col], scale_ref.at[self.walk.cols + col], *weights_ref]
        length = self.rows + FLOATS

        plgpu.copy_gmem_to_smem(q_ref.at[down, :, across], self.q_s.at[slot], self.full.at[slot])
        plgpu.copy_gmem_to_smem(d_h_ref.at[down, across], self.d_h_s.at[slot], self.full.at[slot])
        for i, line in enumerate(lines):
            to = self.scale_s.at[slot, i, pl.ds(0, length)]
            plgpu.copy_gmem_to_smem(line.at[pl.ds(row - before, length)], to, self.full.at[slot])

    def work(self, place: Any, slot: Scalar, refill: Any) -> None:
        *tile, number = place
        layout, weighted = rows_layout(self.d_h_s.dtype), len(self.taken) == 4
        plgpu.barrier_wait(self.full.at[slot])

        def factor(which: int) -> jax.Array:
            own = self.scale_s.at[slot, which, pl.ds(self.slab(place)[1], self.rows)]
            line = plgpu.load(own, layout=layout.reduce(1), optimized=False)
            return lax.broadcast_in_dim(line, (self.rows, TILE), [0])

        gate, up = (
            plgpu.load(self.q_s.at[slot, :, i], layout=layout).astype(jnp.float32) * factor(i)
            for i in (GATE, UP)
        )
        d_h = plgpu.load(self.d_h_s.at[slot], layout=layout).astype(jnp.float32)
        weight = factor(H) if weighted else None
        refill()
        *results, sums = _gradients(gate, up, d_h, weight)
        # What earlier tiles left there is on its way.
        pl.when(number == 0)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
        here = pl.ds(number * self.rows, self.rows)
        for i, x in enumerate(results):
            _cast(x, self.tile_s.at[i, here], self.line_s.at[i, here])
        if weighted:
            self.line_s[SUMS, here] = sums
        pl.when(number == TILE // self.rows - 1)(lambda: self.finish(tuple(tile)))

    def finish(self, place: Place) -> None:
        tile, col, start, valid = place
        own = self.walk.own(place)
        grad_ref, grad_scale_ref, grad_t_ref, grad_t_scale_ref, *h_t_refs = self.given[:6]
        plgpu.commit_smem()
        for i in (GATE, UP):
            at = col + i * self.walk.cols
            store_rows(self.tile_s.at[i], own, grad_ref, start, at)
            self.store_line(i, grad_scale_ref.at[at], start, own)
        for ref in self.given[6:]:
            self.store_line(SUMS, ref.at[col], start, own)
        self.turn(H, self.walk, place, *h_t_refs)
        for i in (GATE, UP):
            at = col + i * self.walk.cols
            self.turn(i, self.wide, (tile, at, start, valid), grad_t_ref, grad_t_scale_ref)

    def store_line(self, which: int, out: Any, start: Scalar, valid: Count) -> None:
        store_line(
            plgpu.load(self.line_s.at[which], layout=LINE), self.own_s, valid,
            lambda first, size: out.at[pl.ds(start + first, size)],
        )  # fmt: skip

    def turn(self, which: int, walk: Walk, place: Place, q_t_ref: Any, scale_t_ref: Any) -> None:
        """The transpose from the values cast along the rows, in their place."""
        tile_q, valid = self.tile_s.at[which], place[3]
        if walk.groups:
            clear_rows(tile_q, rows_layout(E4M3), valid)
        own_scales(self.line_s.at[which], self.own_s, valid)
        scales = plgpu.load(self.own_s, layout=COLUMN(16).reduce(0), optimized=False)
        columns = load_columns(tile_q).astype(jnp.float32)
        columns *= lax.broadcast_in_dim(scales, columns.shape, [1])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_columns(columns, tile_q, self.own_s, walk, q_t_ref, scale_t_ref, place, True)


def _cast(x: jax.Array, q_ref: Any, scale_ref: Any) -> None:
    """Along the rows, and the rows' scales."""
    scale, inverse = tile_scale(jnp.max(jnp.abs(x), axis=1), True)
    q_ref[...] = (x * lax.broadcast_in_dim(inverse, x.shape, [0])).astype(E4M3)
    scale_ref[...] = scale


def _gradients(
    gate: jax.Array, up: jax.Array, d_h: jax.Array, weight: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Of gate and up, then h times the weight, and the rows' sums of d_h * h without it."""
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    h = silu * up
    sums = None
    if weight is not None:
        sums = jnp.sum(d_h * h, axis=1)
        d_h, h = d_h * weight, h * weight
    return d_h * up * (sigmoid + silu * (1 - sigmoid)), d_h * silu, h, sums


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, (*((0, 0) for _ in x.shape[1:]), (0, -x.shape[-1] % FLOATS)))
