"""Which output tile a cluster of SMs computes next.

Every kernel of the family is persistent: one cluster a slot of the grid walks a list of tiles that
all its warpgroups know without talking to one another. A walk calls `visit(work, step)` for each
tile; `step` counts the stages of shared memory used so far, so that the ring of stages runs on
across tiles. The lists are static for one matrix, and follow the group sizes read on the device
for grouped ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Int

ALIGNED = 8  # rows of a swizzled tile of shared memory
Scalar = Any  # an int where it is known when tracing, an int32 scalar on the device otherwise


@dataclasses.dataclass(frozen=True)
class Work:
    """One output tile of a cluster: its corner, its group, and the blocks of K to go through."""

    group: Scalar
    row: Scalar
    col: Scalar
    start: Scalar  # rows [start, end) belong to the group
    end: Scalar
    first_block: Scalar
    blocks: Scalar


@dataclasses.dataclass(frozen=True)
class Extent:
    """The static side of a walk: tiles of a cluster, and how they are strung together.

    `band` rows of tiles are walked column by column, so that what a wave of clusters reads of A
    and B stays in L2.
    """

    rows: int  # rows of a cluster's tile
    cols: int
    n: int
    blocks: int  # blocks of K of one tile
    band: int
    slots: int | None = None
    """Clusters that walk; None: the whole grid."""

    @property
    def walkers(self) -> int:
        return self.slots or lax.axis_size("slot")

    @property
    def col_tiles(self) -> int:
        return -(-self.n // self.cols)

    def corner(self, tile: Scalar, row_tiles: Scalar) -> tuple[Scalar, Scalar]:
        """(row, column) of tile number `tile` of a matrix that is `row_tiles` tiles high."""
        per_band = self.band * self.col_tiles
        band = lax.div(tile, jnp.int32(per_band))
        within = lax.rem(tile, jnp.int32(per_band))
        height = lax.min(jnp.int32(self.band), row_tiles - band * self.band)
        col = lax.div(within, height)
        odd = lax.rem(band, jnp.int32(2)) == 1
        col = lax.select(odd, self.col_tiles - 1 - col, col)
        return (band * self.band + lax.rem(within, height)) * self.rows, col * self.cols


Visit = Callable[[Work, Scalar], Scalar]


def rows(
    kind: Literal["dense", "grouped", "masked"], extent: Extent, rows: int, splits: int, sizes: Any,
    visit: Visit,
) -> Scalar:  # fmt: skip
    """Tiles of a product whose groups, if there are any, are of rows."""
    if kind == "dense":
        return dense(extent, rows, splits, visit)
    return {"grouped": grouped, "masked": masked}[kind](extent, sizes, visit)


def dense(extent: Extent, rows: int, splits: int, visit: Visit) -> Scalar:
    """One matrix; `splits` > 1 cuts K, and the cut's number is the work's group."""
    row_tiles = -(-rows // extent.rows)
    tiles = row_tiles * extent.col_tiles
    share = -(-extent.blocks // splits)
    slot, slots = lax.axis_index("slot"), extent.walkers

    def body(i: Scalar, step: Scalar) -> Scalar:
        tile = slot + i * slots
        split = lax.div(tile, jnp.int32(tiles))
        row, col = extent.corner(lax.rem(tile, jnp.int32(tiles)), jnp.int32(row_tiles))
        first = split * share
        blocks = lax.min(jnp.int32(share), extent.blocks - first) if splits > 1 else extent.blocks
        return visit(Work(split, row, col, 0, rows, first, blocks), step)

    count = lax.div(tiles * splits - slot + slots - 1, jnp.int32(slots))
    return lax.fori_loop(0, count, body, jnp.int32(0))


def grouped(extent: Extent, sizes: Int[Array, " g"], visit: Visit) -> Scalar:
    """Groups of rows behind one another. A group's tiles start at the multiple of 8 rows at or
    before its first row: TMA fetches swizzled tiles of 8 rows."""

    def lead(before: Scalar) -> Scalar:
        return lax.rem(before, jnp.int32(ALIGNED))

    def row_tiles(before: Scalar, size: Scalar) -> Scalar:
        high = lax.div(lead(before) + size + extent.rows - 1, jnp.int32(extent.rows))
        return lax.select(size > 0, high, jnp.int32(0))

    def work(group: Scalar, before: Scalar, size: Scalar, corner: tuple[Scalar, Scalar]) -> Work:
        row = lax.div(before, jnp.int32(ALIGNED)) * ALIGNED + corner[0]
        return Work(group, row, corner[1], before, before + size, 0, extent.blocks)

    return _walk_groups(extent, sizes, row_tiles, lambda size: size, work, visit)


def masked(extent: Extent, counts: Int[Array, " g"], visit: Visit) -> Scalar:
    """A matrix a group, of which the first rows count."""

    def row_tiles(_: Scalar, size: Scalar) -> Scalar:
        return lax.div(size + extent.rows - 1, jnp.int32(extent.rows))

    def work(group: Scalar, _: Scalar, size: Scalar, corner: tuple[Scalar, Scalar]) -> Work:
        return Work(group, *corner, 0, size, 0, extent.blocks)

    return _walk_groups(extent, counts, row_tiles, lambda size: size, work, visit)


def k_grouped(extent: Extent, rows: int, sizes: Int[Array, " g"], visit: Visit) -> Scalar:
    """A product a group, whose K is the group: whole blocks of `extent.blocks` rows."""
    high = -(-rows // extent.rows)

    def blocks(size: Scalar) -> Scalar:
        return lax.div(size + extent.blocks - 1, jnp.int32(extent.blocks))

    def work(group: Scalar, before: Scalar, size: Scalar, corner: tuple[Scalar, Scalar]) -> Work:
        return Work(group, *corner, 0, rows, before, blocks(size))

    return _walk_groups(extent, sizes, lambda *_: jnp.int32(high), blocks, work, visit)


def row_grouped(
    extent: Extent, rows: int, sizes: Int[Array, " g"], block: int, visit: Visit
) -> Scalar:
    """A product a group, whose K is the group's rows, wherever they start: `first_block` is the
    first row of the blocks, a multiple of 8 at or before the group's."""
    high = -(-rows // extent.rows)

    def work(group: Scalar, before: Scalar, size: Scalar, corner: tuple[Scalar, Scalar]) -> Work:
        first = lax.div(before, jnp.int32(ALIGNED)) * ALIGNED
        end = before + size
        blocks = lax.select(
            size > 0, lax.div(end - first + block - 1, jnp.int32(block)), jnp.int32(0)
        )
        return Work(group, *corner, before, end, first, blocks)

    return _walk_groups(extent, sizes, lambda *_: jnp.int32(high), lambda size: size, work, visit)


def _walk_groups(
    extent: Extent,
    sizes: Int[Array, " g"],
    row_tiles: Callable[[Scalar, Scalar], Scalar],
    advance: Callable[[Scalar], Scalar],
    work: Callable[..., Work],
    visit: Visit,
) -> Scalar:
    """Tiles of all groups in a row. `advance` is what a group adds to those before it."""
    slots = extent.walkers

    def group_tiles(group: Scalar, carry: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        tile, tiles_before, before, step = carry
        size = sizes[group]
        high = row_tiles(before, size)
        after = tiles_before + high * extent.col_tiles
        count = lax.max(0, lax.div(after - tile + slots - 1, jnp.int32(slots)))

        def body(i: Scalar, step: Scalar) -> Scalar:
            corner = extent.corner(tile + i * slots - tiles_before, high)
            return visit(work(group, before, size, corner), step)

        step = lax.fori_loop(0, count, body, step)
        return tile + count * slots, after, before + advance(size), step

    start = (lax.axis_index("slot"), *(jnp.int32(0) for _ in range(3)))
    return lax.fori_loop(0, sizes.shape[0], group_tiles, start)[3]
