"""Quantisation along columns on Hopper, with the transposed output that weight gradients need.

The walk over 128 x 128 tiles is that of `sm90_quantize`. Here a thread holds one column of a tile:
it reads it from shared memory element by element, beside its neighbours, finds the largest
magnitude without asking them, and writes a row of the transposed tile, 16 bytes at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE, padded_rows, tile_scale
from pallas_kernels.sm90_quantize import (
    LINE,
    STAGE_BYTES,
    Count,
    Scalar,
    count_from,
    launch,
    quantize_rows,
    rows_layout,
    stages_of,
    store_line,
    store_rows,
    stream,
)
from pallas_kernels.sm90_tile import keep_row_major

COLUMN = plgpu.Layout.TCGEN05_TMEM_NATIVE  # of [128, 128]: a row a thread, in pieces of that size
FLOATS = 4  # in 16 bytes: TMA takes rows of whole 16 bytes, and starts within them at such
SCALES = 160  # a stage of them: 128 and up to 3 before, in whole lines of 128 bytes
Place = tuple[Scalar, Scalar, Scalar, Scalar]
"""Tile of 128 rows in the transposed form, tile of columns, its first row, how many are its own."""
Cursor = tuple[Scalar, ...]
"""A group, its size, the tiles and rows before it; nothing without groups."""


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles of x [m, k], in the order of the transposed form."""

    m: int
    k: int
    groups: int

    @property
    def cols(self) -> int:
        return ceil_div(self.k, TILE)

    @property
    def rows(self) -> int:
        return padded_rows(self.m, self.groups)

    @property
    def units(self) -> int:
        return self.rows // TILE * self.cols

    @property
    def transposed(self) -> list[jax.ShapeDtypeStruct]:
        """q_t, and scale_t with its rows and columns exchanged."""
        scale = (self.rows // TILE, self.k)
        return [
            jax.ShapeDtypeStruct((self.k, self.rows), E4M3),
            jax.ShapeDtypeStruct(scale, jnp.float32),
        ]

    def own(self, place: Place) -> Count:
        """How many rows of the tile are its own."""
        return TILE if not self.groups and self.m % TILE == 0 else place[3]

    def first(self, sizes_ref: Any) -> Cursor:
        zero = jnp.int32(0)
        return (zero, sizes_ref[0], zero, zero) if self.groups else ()

    def locate(self, unit: Scalar, cursor: Cursor, sizes_ref: Any) -> tuple[Place, Cursor]:
        tile, col = lax.div(unit, jnp.int32(self.cols)), lax.rem(unit, jnp.int32(self.cols))
        if not self.groups:
            start, end = tile * TILE, jnp.int32(self.m)
        else:
            start, end, cursor = self._in_group(tile, cursor, sizes_ref)
        rows = lax.min(end, jnp.int32(self.m)) - start
        return (tile, col, start, lax.clamp(jnp.int32(0), rows, jnp.int32(TILE))), cursor

    def _in_group(
        self, tile: Scalar, cursor: Cursor, sizes_ref: Any
    ) -> tuple[Scalar, Scalar, Cursor]:
        """First row of the tile, end of its group, and the cursor moved to that group.

        Tiles behind the last group have no rows: they start at m, where TMA reads zeros.
        """

        def tiles_to(cursor: Cursor) -> Scalar:
            _, size, tiles, _ = cursor
            return tiles + lax.div(size + TILE - 1, jnp.int32(TILE))

        def behind(cursor: Cursor) -> Scalar:
            return (cursor[0] < self.groups) & (tiles_to(cursor) <= tile)

        def skip(cursor: Cursor) -> Cursor:
            group, size, _, rows = cursor
            following = sizes_ref[lax.min(group + 1, self.groups - 1)]
            return group + 1, following, tiles_to(cursor), rows + size

        group, size, tiles, rows = cursor = lax.while_loop(behind, skip, cursor)
        outside = group == self.groups
        start = lax.select(outside, jnp.int32(self.m), rows + (tile - tiles) * TILE)
        return start, lax.select(outside, jnp.int32(self.m), rows + size), cursor


@lowered_once
def both(
    x: jax.Array, sizes: jax.Array | None, *, power_of_two: bool, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """`quantize_both` of x [M, K], K % 16 == 0."""
    q, scale, q_t, scale_t = _from_floats(x, sizes, power_of_two, True, sms, interpret)
    return q, scale.T, q_t, scale_t.T


@lowered_once
def transposed(
    x: jax.Array, sizes: jax.Array | None, *, power_of_two: bool, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`quantize_transposed` of x [M, K], K % 16 == 0."""
    q_t, scale_t = _from_floats(x, sizes, power_of_two, False, sms, interpret)
    return q_t, scale_t.T


def _from_floats(
    x: jax.Array, sizes: jax.Array | None, power_of_two: bool, rows: bool, sms: int | None,
    interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    """With `rows` the tiles along K too, first; scales with rows and columns exchanged."""
    walk = Walk(*x.shape, 0 if sizes is None else sizes.shape[0])
    layout = rows_layout(x.dtype)
    stages = stages_of(x.dtype.itemsize, STAGE_BYTES)

    def body(x_ref, *refs, x_s, q_t_s, line_s, full, **spare):
        *before, q_t_ref, scale_t_ref = refs
        sizes_ref = before[: walk.groups > 0]

        def fetch(place, slot):
            _, col, start, _ = place
            source = x_ref.at[pl.ds(start, TILE), pl.ds(col * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, x_s.at[slot], full.at[slot])

        def start_rows(x_s, place):
            """All but the values' store, for which x_s has to be read first."""
            _, col, start, _ = place
            q, scale = quantize_rows(plgpu.load(x_s, layout=layout), line_s, layout, power_of_two)
            store_line(
                scale, line_s.at[0], walk.own(place),
                lambda first, size: before[-1].at[col, pl.ds(start + first, size)],
            )  # fmt: skip
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            spare["q_s"][...] = q

        def work(place, slot, refill):
            _, col, start, valid = place
            plgpu.barrier_wait(full.at[slot])
            if rows:
                start_rows(x_s.at[slot], place)
            if sizes_ref:
                clear_rows(x_s.at[slot], layout, valid)
            columns = load_columns(x_s.at[slot])
            refill()
            if rows:
                store_rows(spare["q_s"], walk.own(place), before[-2], start, col)
            else:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_columns(
                columns, q_t_s, line_s.at[0], walk, q_t_ref, scale_t_ref, place, power_of_two
            )

        if interpret is None:
            keep_row_major(x_s, *spare.values())
        stream_tiles(walk, stages, fetch, work, sizes_ref)

    by_row = [
        jax.ShapeDtypeStruct(x.shape, E4M3),
        jax.ShapeDtypeStruct((walk.cols, walk.m), jnp.float32),
    ]
    return launch(
        body, x, *operands_of(sizes), name="quantize_both" if rows else "quantize_transposed",
        units=walk.units, sms=sms, interpret=interpret,
        out=(by_row if rows else []) + walk.transposed,
        smem=dict(
            x_s=((stages, TILE, TILE), x.dtype), q_t_s=((TILE, TILE), E4M3),
            line_s=((2, TILE), jnp.float32), **({"q_s": ((TILE, TILE), E4M3)} if rows else {}),
        ),
        full=plgpu.Barrier(num_barriers=stages),
    )  # fmt: skip


@lowered_once
def requantize(
    q: jax.Array, scale: jax.Array, sizes: jax.Array | None, *, power_of_two: bool,
    sms: int | None = None, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`requantize_transposed` of q [M, K], K % 16 == 0."""
    walk = Walk(*q.shape, 0 if sizes is None else sizes.shape[0])
    layout = rows_layout(q.dtype)
    stages = stages_of(q.dtype.itemsize, STAGE_BYTES)

    def body(q_ref, scale_ref, *refs, q_s, scale_s, q_t_s, line_s, full):
        *sizes_ref, q_t_ref, scale_t_ref = refs

        def fetch(place, slot):
            _, col, start, _ = place
            rows = pl.ds(start, TILE)
            source = q_ref.at[rows, pl.ds(col * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, q_s.at[slot], full.at[slot])
            scales = pl.ds(start - lax.rem(start, jnp.int32(FLOATS)), TILE + FLOATS)
            part = scale_s.at[slot, pl.ds(0, TILE + FLOATS)]
            plgpu.copy_gmem_to_smem(scale_ref.at[col, scales], part, full.at[slot])

        def work(place, slot, refill):
            plgpu.barrier_wait(full.at[slot])
            if sizes_ref:
                clear_rows(q_s.at[slot], layout, place[3])
                fetched = pl.ds(lax.rem(place[2], jnp.int32(FLOATS)), TILE)
                own_scales(scale_s.at[slot, fetched], line_s.at[1], place[3])
            columns = load_columns(q_s.at[slot]).astype(jnp.float32)
            scales = line_s.at[1] if sizes_ref else scale_s.at[slot, pl.ds(0, TILE)]
            scales = plgpu.load(scales, layout=COLUMN(16).reduce(0), optimized=False)
            columns *= lax.broadcast_in_dim(scales, columns.shape, [1])
            refill()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store_columns(
                columns, q_t_s, line_s.at[0], walk, q_t_ref, scale_t_ref, place, power_of_two
            )

        if interpret is None:
            keep_row_major(q_s)
        stream_tiles(walk, stages, fetch, work, sizes_ref)

    scale = jnp.pad(scale.T, ((0, 0), (0, -walk.m % FLOATS)))
    q_t, scale_t = launch(
        body, q, scale, *operands_of(sizes), name="requantize_transposed", units=walk.units,
        sms=sms, interpret=interpret, out=walk.transposed, most_ctas=3,
        smem=dict(
            q_s=((stages, TILE, TILE), E4M3), scale_s=((stages, SCALES), jnp.float32),
            q_t_s=((TILE, TILE), E4M3), line_s=((2, TILE), jnp.float32),
        ),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )  # fmt: skip
    return q_t, scale_t.T


def operands_of(sizes: jax.Array | None) -> list[jax.Array]:
    return [] if sizes is None else [sizes]


def stream_tiles(
    walk: Walk, stages: int, fetch: Any, work: Any, sizes_ref: Sequence[Any], parts: int = 1
) -> None:
    """`stream` of a walk's tiles; sizes_ref holds the groups' sizes, or nothing."""
    (ref,) = sizes_ref or (None,)

    def locate(unit: Scalar, cursor: Cursor) -> tuple[Place, Cursor]:
        return walk.locate(unit, cursor, ref)

    stream(walk.units, stages, fetch, work, locate, walk.first(ref), parts)


def clear_rows(ref: Any, layout: Any, valid: Scalar) -> None:
    """Zeros in the rows that belong to the next group."""

    @pl.when(valid < TILE)
    def _():
        values = plgpu.load(ref, layout=layout)
        values = values.astype(jnp.float32) if ref.dtype == E4M3 else values
        row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout)
        ref[...] = jnp.where(row < valid, values, jnp.zeros_like(values)).astype(ref.dtype)


def own_scales(scales: Any, line: Any, valid: Scalar) -> None:
    """In `line` those of a tile's own rows, and zeros."""
    row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=LINE)
    scales = plgpu.load(scales, layout=LINE)
    line[...] = jnp.where(row < valid, scales, jnp.zeros_like(scales))


def load_columns(ref: Any) -> jax.Array:
    """The transpose of ref [128, 128], a column of it a thread."""
    return plgpu.layout_cast(plgpu.load(ref.T, layout=COLUMN(1)), COLUMN(16))


def store_columns(
    columns: jax.Array, q_t_s: Any, scratch: Any, walk: Walk, q_t_ref: Any, scale_t_ref: Any,
    place: Place, power_of_two: bool,
) -> None:  # fmt: skip
    """Quantise columns [128 of x's columns, 128 of its rows] and store them, once q_t_s is free."""
    tile, col, _, _ = place
    amax = jnp.max(jnp.abs(columns), axis=1).astype(jnp.float32)
    scale, inverse = tile_scale(amax, power_of_two)
    scaled = columns.astype(jnp.float32) * lax.broadcast_in_dim(inverse, columns.shape, [0])
    q_t_s[...] = scaled.astype(E4M3)
    plgpu.commit_smem()
    out = q_t_ref.at[pl.ds(col * TILE, TILE), pl.ds(tile * TILE, TILE)]
    plgpu.copy_smem_to_gmem(q_t_s, out)
    store_line(
        scale, scratch, count_from(col * TILE, walk.k),
        lambda first, size: scale_t_ref.at[tile, pl.ds(col * TILE + first, size)],
    )  # fmt: skip
