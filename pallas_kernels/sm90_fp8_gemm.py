"""FP8 GEMM on Hopper: e4m3 operands, block scales, float32 promotion every 128 of K.

One warpgroup fetches tiles of A, B and A's scales with TMA into a ring of stages; the others each
multiply: four WGMMAs into a fresh accumulator, then `sum += scale * accumulator` in registers,
because the tensor core's own accumulator keeps about 14 bits (DeepSeek-V3 report, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_schedule
from pallas_kernels.sm90_launch import Refs, launch
from pallas_kernels.sm90_schedule import Extent, Scalar, Visit, Work
from pallas_kernels.sm90_tile import (
    ROWS,
    Tile,
    corner,
    empty_barriers,
    extent,
    line_of,
    store,
    swizzled,
)

BLOCK = 128  # of K: one scale, one stage
Kind = Literal["dense", "grouped", "masked", "k_grouped"]


@dataclasses.dataclass(frozen=True)
class _Gemm:
    """The kernel's static side; its methods are traced inside the kernel."""

    kind: Kind
    tile: Tile
    rows: int  # of A; of a group of A when masked
    n: int
    blocks: int
    scale_blocks: int  # along N; 0 where B has a scale a row
    out_dtype: Any

    @property
    def extent(self) -> Extent:
        return extent(self.tile, self.n, BLOCK if self.kind == "k_grouped" else self.blocks)

    @property
    def scale_width(self) -> int:
        """Columns of a product that are sure to share a scale of B."""
        return math.gcd(self.tile.n, BLOCK) if self.scale_blocks else self.tile.n

    @property
    def piece(self) -> int:
        return math.gcd(
            self.tile.piece(self.n, self.out_dtype, self.kind == "grouped"), self.scale_width
        )

    def walk(self, sizes: Any, visit: Visit) -> Scalar:
        if self.kind == "dense":
            return sm90_schedule.dense(self.extent, self.rows, self.tile.splits, visit)
        if self.kind == "k_grouped":
            return sm90_schedule.k_grouped(self.extent, self.rows, sizes, visit)
        walk = sm90_schedule.masked if self.kind == "masked" else sm90_schedule.grouped
        return walk(self.extent, sizes, visit)

    def b_group(self, work: Work) -> Scalar:
        return work.group if self.kind in ("grouped", "masked") else 0

    def through(self, work: Work, step: Scalar, body: Callable[..., Any], carry: Any) -> Any:
        """Call `body(first block, stages, carry)` for every `depth` blocks of the work."""
        depth = self.tile.depth

        def some(i: Scalar, carry: Any) -> Any:
            first = i * depth
            stages = [lax.rem(step + first + d, jnp.int32(self.tile.stages)) for d in range(depth)]
            return body(first, stages, carry)

        return lax.fori_loop(0, lax.div(work.blocks, jnp.int32(depth)), some, carry)

    def fetch(self, refs: Refs, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(self.tile, work)
        a_group = work.group if self.kind == "masked" else 0

        def body(i: Scalar, _: None) -> None:
            slot = lax.rem(step + i, jnp.int32(tile.stages))

            @pl.when(step + i >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])
                plgpu.commit_smem()  # scales read by threads before TMA writes over them

            at = work.first_block + i
            ms, ns, ks = pl.ds(row, tile.height), pl.ds(col, tile.width), pl.ds(at * BLOCK, BLOCK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.full.at[slot])
            copy(refs.a.at[a_group, ms, ks], refs.a_smem.at[slot],
                 collective_axes="pair" if tile.shares_a else None)  # fmt: skip
            copy(refs.b.at[self.b_group(work), ns, ks], refs.b_smem.at[slot],
                 collective_axes="pair" if tile.shares_b else None)  # fmt: skip
            scale_rows = pl.ds(a_group * self.rows + row, tile.height)
            copy(refs.a_scale.at[at, scale_rows], refs.a_scale_smem.at[slot])
            if not self.scale_blocks:
                copy(refs.b_scale.at[at, ns], refs.b_scale_smem.at[slot])

        lax.fori_loop(0, work.blocks, body, None)
        return step + work.blocks

    def block_scales(self, refs: Refs, work: Work, col: Scalar, i: Scalar) -> tuple[Scalar, ...]:
        """B's scales of block i, one for each `scale_width` columns of the tile."""
        if not self.scale_blocks:
            return ()
        width, step = self.tile.width, self.scale_width
        at = work.first_block + lax.min(i, work.blocks - 1)
        first, last = lax.div(col, jnp.int32(BLOCK)), jnp.int32(self.scale_blocks - 1)
        count = (BLOCK - step + width - 1) // BLOCK + 1
        found = [refs.b_scale[self.b_group(work), lax.min(first + j, last), at]
                 for j in range(count)]  # fmt: skip
        if width % BLOCK == 0 or count == 1:
            return tuple(found[c // BLOCK] for c in range(0, width, step))
        lead = lax.rem(col, jnp.int32(BLOCK))
        scales = []
        for c in range(0, width, step):
            scale = found[0]
            for j in range(1, count):
                scale = lax.select(lead + c >= j * BLOCK, found[j], scale)
            scales.append(scale)
        return tuple(scales)

    def row_scales(self, refs: Refs, wg: Scalar, slot: Scalar) -> tuple[jax.Array, ...]:
        """Wait for a stage; its scales of A for each product down."""
        plgpu.barrier_wait(refs.full.at[slot])
        rows = [pl.ds(wg * self.tile.rows + d * ROWS, ROWS) for d in range(self.tile.down)]
        layout = plgpu.Layout.WGMMA.reduce(1)
        return tuple(plgpu.load(refs.a_scale_smem.at[slot, r], layout=layout) for r in rows)

    def multiply(self, refs: Refs, wg: Scalar, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(self.tile, work)
        row += wg * tile.rows

        def skip() -> None:
            def body(_: Scalar, stages: list, carry: None) -> None:
                for slot in stages:
                    plgpu.barrier_wait(refs.full.at[slot])
                    plgpu.barrier_arrive(refs.empty.at[slot])

            self.through(work, step, body, None)

        def body(first: Scalar, stages: list, carry: tuple) -> tuple:
            sums, a_now, b_now = carry
            then = first + tile.depth

            def ahead() -> tuple[tuple, tuple]:
                """While products are in flight: the scales for the next round."""
                b_next = tuple(
                    self.block_scales(refs, work, col, then + d) for d in range(tile.depth)
                )
                slot = lax.rem(step + then, jnp.int32(tile.stages))
                read = functools.partial(self.row_scales, refs, wg, slot)
                return lax.cond(then < work.blocks, read, lambda: a_now), b_next

            product = self.one_product if len(sums) == 1 else self.several_products
            sums, scales = product(refs, wg, stages, sums, a_now, b_now, ahead)
            return sums, *scales

        def compute() -> None:
            sums = self.zeros()
            b_now = tuple(self.block_scales(refs, work, col, d) for d in range(tile.depth))
            first = lax.rem(step, jnp.int32(tile.stages))
            carry = sums, self.row_scales(refs, wg, first), b_now
            sums, *_ = self.through(work, step, body, carry)
            self.store(refs, wg, work, row, col, sums)

        def nothing() -> None:
            self.store(refs, wg, work, row, col, self.zeros())

        if self.kind == "k_grouped":
            lax.cond(work.blocks > 0, compute, nothing)
        else:
            lax.cond(work.end > row, compute, skip)
        return step + work.blocks

    def zeros(self) -> tuple[tuple[jax.Array, ...], ...]:
        """Sums of every product, in pieces of `scale_width` columns."""
        zero = jnp.zeros((ROWS, self.scale_width), jnp.float32)
        piece = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        return ((piece,) * (self.tile.n // self.scale_width),) * (self.tile.down * self.tile.across)

    def issue(self, refs: Refs, wg: Scalar, slot: Scalar, place: int, acc: Any) -> None:
        tile = self.tile
        a_rows = pl.ds(wg * tile.rows + place // tile.across * ROWS, ROWS)
        b_rows = pl.ds(place % tile.across * tile.n, tile.n)
        plgpu.wgmma(acc, refs.a_smem.at[slot, a_rows], refs.b_smem.at[slot, b_rows].T)

    def promote(
        self, sums: tuple, fresh: jax.Array, a_scale: jax.Array, b_scales: tuple, b_rows: Any
    ) -> tuple[jax.Array, ...]:
        """The sums with a fresh product times its scales added."""
        width = self.scale_width
        new = []
        for at, total in enumerate(sums):
            part = fresh if len(sums) == 1 else fresh[:, at * width : (at + 1) * width]
            scale = a_scale
            if b_rows is None:
                scale = scale * b_scales[at]
            else:
                part = part * lax.broadcast_in_dim(b_rows, part.shape, [1])
            new.append(total + part * lax.broadcast_in_dim(scale, part.shape, [0]))
        return tuple(new)

    def one_product(
        self, refs: Refs, wg: Scalar, stages: list, sums: tuple, a_now: tuple, b_now: tuple,
        ahead: Callable[[], tuple],
    ) -> tuple[tuple, tuple]:  # fmt: skip
        """Several blocks of K in flight, each in an accumulator of its own."""

        def products(*accs: Any) -> tuple[tuple, tuple]:
            a_scales, b_rows = [], []
            for d, (slot, acc) in enumerate(zip(stages, accs, strict=True)):
                a_scales.append((a_now if d == 0 else self.row_scales(refs, wg, slot))[0])
                columns = plgpu.Layout.WGMMA.reduce(0)
                b_rows.append(
                    None if self.scale_blocks
                    else plgpu.load(refs.b_scale_smem.at[slot], layout=columns)
                )  # fmt: skip
                self.issue(refs, wg, slot, 0, acc)
            scales = ahead()
            (total,) = sums
            for d, (slot, acc) in enumerate(zip(stages, accs, strict=True)):
                fresh = plgpu.wgmma_accumulator_load(acc, wait_n=len(stages) - 1 - d)
                plgpu.barrier_arrive(refs.empty.at[slot])
                total = self.promote(total, fresh, a_scales[d], b_now[d], b_rows[d])
            return (total,), scales

        acc = plgpu.ACC((ROWS, self.tile.n), jnp.float32)
        return pl.run_scoped(products, *(acc,) * len(stages))

    def several_products(
        self, refs: Refs, wg: Scalar, stages: list, sums: tuple, a_now: tuple, b_now: tuple,
        ahead: Callable[[], tuple],
    ) -> tuple[tuple, tuple]:  # fmt: skip
        """Products one after another, each in the same accumulator."""
        (slot,), (b_scales,) = stages, b_now
        across, last = self.tile.across, len(sums) - 1
        pieces = len(sums[0])

        def product(at: int, acc: Any) -> tuple[tuple, tuple]:
            self.issue(refs, wg, slot, at, acc)
            scales = ahead() if at == last else (a_now, b_now)
            fresh = acc[...]
            if at == last:
                plgpu.barrier_arrive(refs.empty.at[slot])
            first = at % across * pieces
            b_scale = b_scales[first : first + pieces]
            return self.promote(sums[at], fresh, a_now[at // across], b_scale, None), scales

        done: tuple = ()
        scales = a_now, b_now
        for at in range(len(sums)):
            # Scales are never this negative. The branch keeps ptxas from starting the next
            # product before this one's accumulator is added up: registers lack for both.
            done, new, scales = lax.cond(
                b_scales[0] < -1e38,
                lambda done=done, at=at: (
                    *jax.tree.map(lambda x: x * 2, (done, sums[at])),
                    (a_now, b_now),
                ),
                lambda done=done, at=at: (
                    done,
                    *pl.run_scoped(
                        functools.partial(product, at),
                        plgpu.ACC((ROWS, self.tile.n), jnp.float32),
                    ),
                ),
            )
            done = (*done, new)
        return done, scales

    def store(
        self, refs: Refs, wg: Scalar, work: Work, row: Scalar, col: Scalar, sums: tuple
    ) -> None:
        tile = self.tile
        ragged = self.kind == "grouped"
        placed = [
            (at // tile.across * ROWS, at % tile.across * tile.n, list(total))
            for at, total in enumerate(sums)
        ]
        out = refs.out.at[0 if ragged else work.group]
        rows = (work.start, work.end) if ragged else None
        store(refs, out, wg, row, col, placed, self.piece, rows)

    def scratch(self) -> dict[str, Any]:
        tile, e4m3 = self.tile, jnp.float8_e4m3fn
        piece = self.piece
        found = dict(
            a_smem=swizzled((tile.stages, tile.height, BLOCK), e4m3),
            b_smem=swizzled((tile.stages, tile.width, BLOCK), e4m3),
            a_scale_smem=plgpu.SMEM((tile.stages, tile.height), jnp.float32),
            out_smem=swizzled((tile.warpgroups, tile.slots, ROWS, piece), self.out_dtype),
            full=plgpu.Barrier(
                num_arrivals=3 if self.scale_blocks else 4, num_barriers=tile.stages
            ),
            empty=empty_barriers(tile),
        )
        if not self.scale_blocks:
            found["b_scale_smem"] = plgpu.SMEM((tile.stages, tile.width), jnp.float32)
        if self.kind == "grouped":
            rows = (tile.warpgroups, ROWS, line_of(self.out_dtype))
            found["rows_smem"] = plgpu.SMEM(rows, self.out_dtype)
        return found


def fp8_gemm(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    sizes: jax.Array | None,
    *,
    kind: Kind,
    tile: Tile,
    out_dtype: Any,
    sms: int,
    interpret: Any = None,
) -> jax.Array:
    """[groups or splits, M, N]; grouped: [1, M, N].

    a [1, M, K] (masked: [groups, M, K]), a_scale [K / 128, groups * M]; b [groups, N, K] with
    b_scale [groups, N / 128, K / 128], a scale a block, or [K / 128, N], one a row. M and N are
    multiples of 8 and 16 (or M < 8), K of 128, the scales' rows of 16 bytes.
    """
    (_, rows, k), (groups, n, _) = a.shape, b.shape
    by_block = b_scale.ndim == 3
    gemm = _Gemm(
        kind, tile, rows, n, k // BLOCK, b_scale.shape[1] if by_block else 0,
        jnp.dtype(out_dtype),
    )  # fmt: skip
    extent = gemm.extent
    slots = sms // tile.cluster
    if kind == "dense":
        slots = min(slots, -(-rows // extent.rows) * extent.col_tiles * tile.splits)
    outs = {"dense": tile.splits, "grouped": 1, "masked": groups}.get(
        kind, 1 if sizes is None else sizes.shape[0]
    )
    return launch(
        gemm, f"fp8_gemm_{kind}",
        dict(a=a, a_scale=a_scale, b=b, b_scale=b_scale, sizes=sizes),
        jax.ShapeDtypeStruct((outs, rows, n), out_dtype), slots, interpret,
    )  # fmt: skip
