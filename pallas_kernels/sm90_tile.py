"""How an SM's output tile is cut, fed and stored: what the Hopper GEMMs share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_schedule import Extent, Scalar, Work

ROWS = 64  # WGMMA's M: what a warpgroup multiplies at a time
SWIZZLE = 128  # bytes: the widest swizzle, and the rows of every stage


@dataclasses.dataclass(frozen=True)
class Tile:
    """The output tile of an SM and the machinery around it.

    Each of `warpgroups` multiplies `down` x `across` products of 64 x `n`; `stages` of shared
    memory hold operands in flight. `beside` = 2 SMs with tiles next to one another share A, or
    `below` = 2 with tiles below one another share B, by TMA multicast inside the card. `splits`
    cuts K, each part with a float32 output of its own. `band` rows of tiles are walked together.
    `depth` blocks of K are multiplied at a time, each into an accumulator of its own. `slots` of
    shared memory hold output on its way out. `sum_bits`: of the FP8 sums' fractions, see
    `gemm_reference.keep_bits`.
    """

    warpgroups: int
    n: int
    stages: int
    down: int = 1
    across: int = 1
    beside: int = 1
    below: int = 1
    splits: int = 1
    band: int = 8
    depth: int = 1
    slots: int = 1
    sum_bits: int | None = None

    @property
    def rows(self) -> int:
        """Of a warpgroup."""
        return ROWS * self.down

    @property
    def height(self) -> int:
        return self.rows * self.warpgroups

    @property
    def width(self) -> int:
        return self.n * self.across

    @property
    def cluster(self) -> int:
        return self.beside * self.below

    def slot(self, number: Scalar) -> Scalar:
        """Of the stage with that number, less than twice round the ring."""
        return lax.select(number >= self.stages, number - self.stages, number)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the cluster's axes."""
        return ("below",) * (self.below > 1) + ("beside",) * (self.beside > 1)

    @property
    def registers(self) -> tuple[int, int] | None:
        """(multiplying, fetching) registers a thread; an SM has 65,536."""
        return {1: None, 2: (240, 24), 3: (160, 32)}[self.warpgroups]


def line_of(dtype: Any) -> int:
    """Elements in 128 bytes: what TMA needs of a row whose copies may start at any row."""
    return SWIZZLE // jnp.dtype(dtype).itemsize


def lines_of(n: int, dtype: Any) -> int:
    """Columns of an output with room for n: whole lines, so that all stores are of the same few
    widths. Mosaic takes minutes over many narrow ones."""
    line = line_of(dtype)
    return -(-n // line) * line


def transforms(columns: int, swizzle: int) -> tuple[Any, Any]:
    """Of shared memory in tiles of 8 rows of so many columns, swizzled over as many bytes."""
    return (
        plgpu.TilingTransform((8, columns)),  # ty: ignore[abstract-class-instantiation]
        plgpu.SwizzleTransform(swizzle),  # ty: ignore[abstract-class-instantiation]
    )


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as TMA and WGMMA like it: tiles of 8 rows, swizzled over their bytes."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    return plgpu.SMEM(shape, dtype, transforms=transforms(swizzle // size, swizzle))


def keep_row_major(*refs: Any) -> None:
    """Of shared memory [..., rows, columns]: Mosaic would tile it, and TMA then take only whole
    tiles of the array. It would also try one tiling after the other, for seconds. The
    interpreter has no layouts."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def untiled(*_: Any) -> None:
        pass

    untiled(*refs)


def ring(tile: Tile, step: Scalar, blocks: Scalar, body: Callable[[Scalar, Scalar], None]) -> None:
    """body(block, slot) for every block; their stages go on round the ring from number `step`."""

    def some(i: Scalar, slot: Scalar) -> Scalar:
        body(i, slot)
        return tile.slot(slot + 1)

    lax.fori_loop(0, blocks, some, lax.rem(step, jnp.int32(tile.stages)))


def release(refs: Any, tile: Tile, work: Work, step: Scalar) -> None:
    """Let go of the stages of a tile in which this warpgroup has no rows."""

    def body(_: Scalar, slot: Scalar) -> None:
        plgpu.barrier_wait(refs.full.at[slot])
        plgpu.barrier_arrive(refs.empty.at[slot])

    ring(tile, step, work.blocks, body)


def may_overwrite(refs: Any) -> None:
    """Order what threads have read of a stage before what TMA writes there next."""
    if not refs.on_device:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()  # `commit_smem` would wait for the other warps, which do not fetch
    def fence(_: Any) -> None:
        space = utils.nvvm.SharedSpace.shared_cta
        utils.nvvm.fence_proxy(utils.nvvm.ProxyKind.async_shared, space=space)

    fence()


def empty_barriers(tile: Tile) -> plgpu.Barrier | plgpu.ClusterBarrier:
    """One a stage, on which every warpgroup that reads the stage arrives."""
    if tile.cluster == 1:
        return plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=tile.stages)
    return plgpu.ClusterBarrier(
        collective_axes=tile.axes, num_arrivals=tile.warpgroups, num_barriers=tile.stages
    )


def out_buffers(tile: Tile, dtype: Any, ragged: bool) -> dict[str, Any]:
    """Shared memory for output on its way out: pieces of the tile's columns of up to 128 bytes, and
    64 rows of 128 bytes where some of them are stored alone."""
    line = line_of(dtype)
    pieces = (tile.warpgroups, tile.slots, ROWS, math.gcd(tile.n, line))
    found = dict(out_smem=swizzled(pieces, dtype))
    if ragged:
        found["rows_smem"] = plgpu.SMEM((tile.warpgroups, ROWS, line), dtype)
    return found


def extent(tile: Tile, n: int, blocks: int, slots: int | None = None) -> Extent:
    """What a walk over a cluster's tiles needs to know."""
    return Extent(
        rows=tile.height * tile.below,
        cols=tile.width * tile.beside,
        n=n,
        blocks=blocks,
        band=tile.band,
        slots=slots,
    )


def corner(tile: Tile, work: Work) -> tuple[Scalar, Scalar]:
    """(row, column) of this SM's tile within its cluster's."""
    row, col = work.row, work.col
    if tile.below > 1:
        row += lax.axis_index("below") * tile.height
    if tile.beside > 1:
        col += lax.axis_index("beside") * tile.width
    return row, col


def store(
    refs: Any, out: Any, wg: Scalar, row: Scalar, col: Scalar, side_by_side: Sequence[jax.Array],
    ragged: tuple[Scalar, Scalar] | None = None, stored: int = 0,
) -> None:  # fmt: skip
    """Store 64 rows of a warpgroup's sums, parts of which lie side by side.

    Ragged are the rows [start, end) of the output that belong to the tile's group. `stored` pieces
    of the tile are on their way already, in the first slots.
    """
    slots = refs.out_smem.at[wg]
    parts = _cut(side_by_side, slots.shape[-1], out.dtype)
    if ragged is None:
        _store_whole(out, slots, row, col, parts, stored)
        return
    low, high = lax.max(ragged[0] - row, 0), lax.min(ragged[1] - row, ROWS)
    lines = _cut(side_by_side, line_of(out.dtype), out.dtype)
    rows = functools.partial(_store_rows, out, refs.rows_smem.at[wg], row, col, lines, low, high)
    lax.cond(
        high - low == ROWS,
        lambda: _store_whole(out, slots, row, col, parts, 0),
        functools.partial(pl.when(high > low), rows),
    )


def _cut(side_by_side: Sequence[jax.Array], width: int, dtype: Any) -> list[jax.Array]:
    return [
        part[:, at : at + width].astype(dtype)
        for part in side_by_side
        for at in range(0, part.shape[1], width)
    ]


def _store_whole(
    out: Any, slots: Any, row: Scalar, col: Scalar, parts: list[jax.Array], stored: int
) -> None:
    """64 rows, as many parts at a time as there are slots left.

    Parts to the right of the output, which is made of whole lines, are left out: TMA would clip
    them, but Mosaic drops a dimension of one part and its index, and writes them over the first.
    """
    count, width = slots.shape[0], parts[0].shape[1]
    at = 0
    while at < len(parts):
        first = (stored + at) % count
        batch = range(at, min(at + count - first, len(parts)))
        if first == 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in batch:
            slots[first + i - at] = parts[i]
        plgpu.commit_smem()
        for i in batch:
            left = col + i * width
            place = out.at[pl.ds(row, ROWS), pl.ds(left, width)]
            copy = functools.partial(plgpu.copy_smem_to_gmem, slots.at[first + i - at], place)
            pl.when(left < out.shape[1])(copy)
        at = batch.stop


def _store_rows(
    out: Any, smem: Any, row: Scalar, col: Scalar, parts: list[jax.Array], low: Scalar, high: Scalar
) -> None:
    """Rows [low, high) of 64: as many copies as the count has bits, each of static size."""
    count = high - low
    line = parts[0].shape[1]

    def copies(left: Scalar) -> None:
        def copy(start: Scalar, size: int) -> None:
            first = low + start
            rows, cols = pl.ds(row + first, size), pl.ds(left, line)
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(first, size)], out.at[rows, cols])

        pieces(count, ROWS // 2, copy)

    for at, part in enumerate(parts):
        left = col + at * line
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = part
        plgpu.commit_smem()
        pl.when(left < out.shape[1])(functools.partial(copies, left))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def pieces(count: Scalar, most: int, visit: Callable[[Scalar, int], None], least: int = 1) -> None:
    """visit(start, size) for sizes that are powers of two and cover [0, count): `least` to `most`,
    each at most once, the larger before the smaller."""
    size = most
    while size >= least:
        pl.when((count & size) != 0)(functools.partial(visit, count & (-2 * size), size))
        size //= 2
