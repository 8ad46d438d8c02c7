"""What a multiplying warpgroup of the FP8 GEMM does along K: products, scaled and added up.

A round is either `depth` blocks of K in flight together, each in an accumulator of its own, or the
several products of one block in turn, each in the registers of the one before. Between a round's
sums and the next round's first product the tensor cores may have nothing to do, so whatever can be
is made ready while products are in flight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_wgmma
from pallas_kernels.gemm_reference import keep_bits
from pallas_kernels.sm90_launch import Refs
from pallas_kernels.sm90_schedule import Scalar, Work
from pallas_kernels.sm90_tile import ROWS, Tile

BLOCK = 128  # of K: one scale, one stage
Parts = tuple[jax.Array, ...]  # of a product: columns that share a scale of B
Sums = tuple[Parts, ...]  # of every product


class Ready(NamedTuple):
    """For the next round: scales and addresses of its first stage."""

    a_scales: tuple[jax.Array, ...]  # for each product down
    b_scales: tuple[Scalar, ...]  # where products are in turn; before a tile's first round unset
    places: tuple[Scalar, ...]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Of one tile and warpgroup; the methods are traced inside the kernel."""

    tile: Tile
    refs: Refs
    wg: Scalar
    work: Work
    row: Scalar  # the warpgroup's first
    col: Scalar
    b_group: Scalar
    scale_blocks: int  # of B along N; 0 where B has a scale a row

    @property
    def several(self) -> bool:
        return self.tile.down * self.tile.across > 1

    @property
    def piece(self) -> int:
        """Columns of a product that are sure to share a scale of B."""
        return math.gcd(self.tile.n, BLOCK) if self.scale_blocks else self.tile.n

    def initial(self) -> Sums:
        """Zeros, or what the sums are to be added to."""
        if not hasattr(self.refs, "init"):
            return self.zeros()
        init = self.refs.init.at[self.work.group]
        sums = []
        for at in range(self.tile.down * self.tile.across):
            down, right = divmod(at, self.tile.across)
            rows = pl.ds(self.row + down * ROWS, ROWS)
            columns = range(right * self.tile.n, (right + 1) * self.tile.n, self.piece)
            parts = (init.at[rows, pl.ds(self.col + first, self.piece)] for first in columns)
            layout = plgpu.Layout.WGMMA
            sums.append(tuple(plgpu.load(p, layout=layout, optimized=False) for p in parts))
        return tuple(sums)

    def zeros(self) -> Sums:
        zero = plgpu.layout_cast(jnp.zeros((ROWS, self.piece), jnp.float32), plgpu.Layout.WGMMA)
        return ((zero,) * (self.tile.n // self.piece),) * (self.tile.down * self.tile.across)

    def each(self, step: Scalar, finish: Callable[[int, Parts], None]) -> None:
        """finish(number, sums) for every product of the tile, over all blocks of the work, whose
        first stage is number `step`; of several products as soon as its own sums are made."""
        if not self.several:
            finish(0, self.sums(step))
            return
        last = self.work.blocks - 1
        slot, sums, accs, ready = self.rounds(step, last)
        self.in_turn(last, [slot], sums, accs, ready, lambda: ready, finish)

    def sums(self, step: Scalar) -> Parts:
        """Of a tile of one product."""
        return self.rounds(step, lax.div(self.work.blocks, jnp.int32(self.tile.depth)))[1][0]

    def rounds(self, step: Scalar, count: Scalar) -> tuple[Scalar, Sums, tuple, Ready]:
        """The first `count`; then the slot of the next one and what it goes on from."""
        depth = self.tile.depth
        slot = lax.rem(step, jnp.int32(self.tile.stages))
        acc = plgpu.layout_cast(jnp.zeros((ROWS, self.tile.n), jnp.float32), plgpu.Layout.WGMMA)
        unset = (jnp.float32(0),) * (self.tile.width // self.piece if self.several else 0)
        ready = Ready(self.row_scales(slot), unset, self.places(slot))

        def some(i: Scalar, carry: tuple) -> tuple:
            slot, sums, accs, ready = carry
            slots = [self.tile.slot(slot + d) for d in range(depth)]
            after = self.tile.slot(slot + depth)
            ahead = functools.partial(self.ahead, (i + 1) * depth, after, ready)
            run = self.in_turn if self.several else self.together
            return after, *run(i * depth, slots, sums, accs, ready, ahead)

        return lax.fori_loop(0, count, some, (slot, self.initial(), (acc,) * depth, ready))

    def ahead(self, first: Scalar, slot: Scalar, ready: Ready) -> Ready:
        """What the round from block `first` on needs, if there is one."""
        read = functools.partial(self.row_scales, slot)
        a_scales = lax.cond(first < self.work.blocks, read, lambda: ready.a_scales)
        b_scales = self.block_scales(first) if self.several else ()
        return Ready(a_scales, b_scales, self.places(slot))

    def together(
        self, block: Scalar, slots: list, sums: Sums, accs: tuple, ready: Ready, ahead: Any
    ) -> tuple[Sums, tuple, Ready]:
        """Several blocks of K in flight."""
        (total,) = sums
        flying, a_scales, columns = [], [], []
        for d, (slot, acc) in enumerate(zip(slots, accs, strict=True)):
            (scale,) = ready.a_scales if d == 0 else self.row_scales(slot)
            a_scales.append(scale)
            columns.append(self.column_scales(slot))
            places = ready.places if d == 0 else self.places(slot)
            flying.append(self.start(acc, slot, 0, places))
        b_scales = [self.block_scales(block + d) for d in range(len(slots))]
        following, done = ahead(), []
        for d, slot in enumerate(slots):
            acc = self.end(flying[d], len(slots) - 1 - d)
            plgpu.barrier_arrive(self.refs.empty.at[slot])
            total = self.promote(total, acc, a_scales[d], b_scales[d], columns[d])
            done.append(acc)
        return (total,), tuple(done), following

    def in_turn(
        self, block: Scalar, slots: list, sums: Sums, accs: tuple, ready: Ready, ahead: Any,
        finish: Callable[[int, Parts], None] | None = None,
    ) -> tuple[Sums, tuple, Ready]:  # fmt: skip
        """The products of one block of K; the last block's sums are finished."""
        (slot,), (acc,) = slots, accs
        pieces, last, following, done = len(sums[0]), len(sums) - 1, ready, []
        b_scales = ()
        for at, total in enumerate(sums):
            acc = self.start(acc, slot, at, ready.places)
            if at == 0:  # before its product, the first read would take an SM's whole way to L2
                first = functools.partial(self.block_scales, 0)
                b_scales = lax.cond(block == 0, first, lambda: ready.b_scales)
            if at == last:
                following = ahead()
            acc = self.end(acc, 0)
            if at == last:
                plgpu.barrier_arrive(self.refs.empty.at[slot])
            down, right = divmod(at, self.tile.across)
            scales = b_scales[right * pieces : (right + 1) * pieces]
            total = self.promote(total, acc, ready.a_scales[down], scales, None)
            if finish:
                finish(at, total)
            else:
                total = tuple(map(self.settle, total))
            done.append(total)
        return tuple(done), (acc,), following

    def promote(
        self, sums: tuple, acc: jax.Array, a_scale: jax.Array, b_scales: tuple, columns: Any
    ) -> tuple[jax.Array, ...]:
        """The sums of a product with `acc` times its scales added."""
        width, new = self.piece, []
        for at, total in enumerate(sums):
            part = acc if len(sums) == 1 else acc[:, at * width : (at + 1) * width]
            scale = a_scale
            if columns is None:
                scale = scale * b_scales[at]
            else:
                part = part * lax.broadcast_in_dim(columns, part.shape, [1])
            added = total + part * lax.broadcast_in_dim(scale, part.shape, [0])
            new.append(keep_bits(added, self.tile.sum_bits))
        return tuple(new)

    def start(self, acc: jax.Array, slot: Scalar, at: int, places: tuple) -> jax.Array:
        """Product number `at` of a stage."""
        down, right = divmod(at, self.tile.across)
        a_row, b_row = down * ROWS, right * self.tile.n
        if self.refs.on_device:
            a, b = places
            return sm90_wgmma.start(acc, a + a_row * sm90_wgmma.ROW, b + b_row * sm90_wgmma.ROW)

        def product(acc: Any) -> jax.Array:
            a = self.refs.a_smem.at[slot, pl.ds(self.wg * self.tile.rows + a_row, ROWS)]
            plgpu.wgmma(acc, a, self.refs.b_smem.at[slot, pl.ds(b_row, self.tile.n)].T)
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, self.tile.n), jnp.float32))

    def end(self, acc: jax.Array, left: int) -> jax.Array:
        return sm90_wgmma.end(acc, left) if self.refs.on_device else acc

    def settle(self, total: jax.Array) -> jax.Array:
        return sm90_wgmma.settle(total) if self.refs.on_device else total

    def places(self, slot: Scalar) -> tuple[Scalar, ...]:
        """Addresses of the warpgroup's operands in a stage; the interpreter has none."""
        if not self.refs.on_device:
            return ()
        a_row = slot * self.tile.height + self.wg * self.tile.rows
        b_row = slot * self.tile.width
        a, b = (sm90_wgmma.address(smem) for smem in (self.refs.a_smem, self.refs.b_smem))
        return a + a_row * sm90_wgmma.ROW, b + b_row * sm90_wgmma.ROW

    def row_scales(self, slot: Scalar) -> tuple[jax.Array, ...]:
        """Wait for a stage; its scales of A for each product down."""
        plgpu.barrier_wait(self.refs.full.at[slot])
        rows = [pl.ds(self.wg * self.tile.rows + d * ROWS, ROWS) for d in range(self.tile.down)]
        layout = plgpu.Layout.WGMMA.reduce(1)
        return tuple(plgpu.load(self.refs.a_scale_smem.at[slot, r], layout=layout) for r in rows)

    def column_scales(self, slot: Scalar) -> jax.Array | None:
        if self.scale_blocks:
            return None
        return plgpu.load(self.refs.b_scale_smem.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))

    def block_scales(self, block: Scalar) -> tuple[Scalar, ...]:
        """B's scales, one for each piece of the tile's columns. They are read while products are in
        flight, from L1 but for one block in 32."""
        if not self.scale_blocks:
            return ()
        width, step = self.tile.width, self.piece
        at = self.work.first_block + lax.min(block, self.work.blocks - 1)
        first, last = lax.div(self.col, jnp.int32(BLOCK)), jnp.int32(self.scale_blocks - 1)
        count = (BLOCK - step + width - 1) // BLOCK + 1
        found = [self.refs.b_scale[self.b_group, lax.min(first + j, last), at]
                 for j in range(count)]  # fmt: skip
        if width % BLOCK == 0 or count == 1:
            return tuple(found[c // BLOCK] for c in range(0, width, step))
        lead = lax.rem(self.col, jnp.int32(BLOCK))
        scales = []
        for c in range(0, width, step):
            scale = found[0]
            for j in range(1, count):
                scale = lax.select(lead + c >= j * BLOCK, found[j], scale)
            scales.append(scale)
        return tuple(scales)
