"""BF16 GEMM on Hopper whose epilogue takes exponentials: the head's product on its way to a loss.

The product and its ring of stages are `sm90_bf16_gemm`'s. A warpgroup has 64 rows of float32 sums
in registers when a tile is done: it takes off each row's largest in the tile, stores powers of 2 of
the rest in bfloat16, and per row and tile what brings tiles together: that largest, the powers'
float32 sum, and the target's own value. Powers relative to their tile's largest have bfloat16's
relative error, which powers of rounded logits would not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm, nvvm
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_launch, sm90_schedule
from pallas_kernels.sm90_launch import Refs
from pallas_kernels.sm90_registers import SCALAR, SINGLE, WGMMA, broadcast, store_rows
from pallas_kernels.sm90_schedule import Scalar, Visit, Work
from pallas_kernels.sm90_tile import (
    Tile,
    corner,
    empty_barriers,
    extent,
    out_buffers,
    release,
    ring,
    store,
    swizzled,
)

BLOCK = 64  # of K: 128 bytes, one stage
TILE = Tile(2, 256, 4, below=2, slots=2)
LOG2E = math.log2(math.e)


class Powers(NamedTuple):
    """Of x = log2(e) * a @ b in tiles of columns."""

    powers: jax.Array  # bfloat16 [M, N]: exp2(x - most of its row and tile)
    most: jax.Array  # float32 [tiles, M]: the largest x
    sums: jax.Array  # float32 [tiles, M]: of powers, before they were rounded
    hits: jax.Array  # float32 [M]: a @ b at the row's target, unspecified if b has no such column


@dataclasses.dataclass(frozen=True)
class _Gemm:
    """The kernel's static side; its methods are traced inside the kernel."""

    tile: Tile
    rows: int
    n: int
    blocks: int

    def walk(self, sizes: Any, visit: Visit) -> Scalar:
        tiles = extent(self.tile, self.n, self.blocks)
        return sm90_schedule.dense(tiles, self.rows, 1, visit)

    def fetch(self, refs: Refs, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(tile, work)

        def body(i: Scalar, slot: Scalar) -> None:
            @pl.when(step + i >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])

            ms, ns, ks = pl.ds(row, tile.height), pl.ds(col, tile.width), pl.ds(i * BLOCK, BLOCK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.full.at[slot])
            copy(refs.a.at[ms, ks], refs.a_smem.at[slot])
            shared = "below" if tile.below > 1 else None
            copy(refs.b.at[ks, ns], refs.b_smem.at[slot], collective_axes=shared)

        ring(tile, step, work.blocks, body)
        return step + work.blocks

    def multiply(self, refs: Refs, wg: Scalar, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(tile, work)
        row += wg * tile.rows

        def compute() -> None:
            rows = refs.targets.at[pl.ds(row, tile.rows)]
            targets = plgpu.load(rows, layout=WGMMA.reduce(1), optimized=False)
            products = functools.partial(self.products, refs, wg, work, step)
            total = pl.run_scoped(products, plgpu.ACC((tile.rows, tile.n), jnp.float32))
            self.take(refs, wg, row, col, total, targets)

        lax.cond(work.end > row, compute, lambda: release(refs, tile, work, step))
        return step + work.blocks

    def products(self, refs: Refs, wg: Scalar, work: Work, step: Scalar, acc: Any) -> jax.Array:
        tile = self.tile
        a_rows = pl.ds(wg * tile.rows, tile.rows)

        def body(i: Scalar, slot: Scalar) -> None:
            plgpu.barrier_wait(refs.full.at[slot])
            plgpu.wgmma(acc, refs.a_smem.at[slot, a_rows], refs.b_smem.at[slot])
            plgpu.wgmma_wait(1)  # the products before these have read their stage

            @pl.when(i > 0)
            def _() -> None:
                plgpu.barrier_arrive(refs.empty.at[tile.slot(slot + tile.stages - 1)])

        ring(tile, step, work.blocks, body)
        total = acc[...]
        last = lax.rem(step + work.blocks - 1, jnp.int32(tile.stages))
        plgpu.barrier_arrive(refs.empty.at[last])
        return total

    def take(
        self, refs: Refs, wg: Scalar, row: Scalar, col: Scalar, total: jax.Array, targets: jax.Array
    ) -> None:
        """Store a warpgroup's powers and what its rows say of the tile."""
        store_hits(refs.hits, total, targets - col, row, refs.on_device)
        most = total.max(axis=1) * LOG2E
        powers = jnp.exp2(total * LOG2E - broadcast(most, total.shape))
        number = lax.div(col, jnp.int32(self.tile.width))
        for out, values in ((refs.most, most), (refs.sums, powers.sum(axis=1))):
            store_rows(out.at[number], values, row, self.rows - row, refs.on_device)
        store(refs, refs.powers, wg, row, col, [powers])

    def scratch(self) -> dict[str, Any]:
        tile, bf16 = self.tile, jnp.bfloat16
        return dict(
            a_smem=swizzled((tile.stages, tile.height, BLOCK), bf16),
            b_smem=swizzled((tile.stages, BLOCK, tile.width), bf16),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            empty=empty_barriers(tile),
            **out_buffers(tile, bf16, False),
        )


def bf16_gemm_softmax(
    a: jax.Array, b: jax.Array, targets: jax.Array, *, sms: int, tile: Tile = TILE,
    interpret: Any = None,
) -> Powers:  # fmt: skip
    """Of a [M, K], b [K, N] and int32 targets [M]: M is a multiple of 8, K of 64, N of the tile's
    width; the tile is one product across."""
    (m, k), n = a.shape, b.shape[1]
    gemm = _Gemm(tile, m, n, k // BLOCK)
    tiles = extent(tile, n, gemm.blocks)
    row_tiles = -(-m // tiles.rows)
    targets = jnp.pad(targets, (0, row_tiles * tiles.rows - m), constant_values=-1)

    def kernel(*refs: Any, **scratch: Any) -> None:
        named = dict(zip(("a", "b", "targets", *Powers._fields), refs, strict=True))
        if interpret is None:
            sm90_launch.take_over()
        sm90_launch.run(gemm, Refs(**named, **scratch, on_device=interpret is None))

    by_tile = jax.ShapeDtypeStruct((tiles.col_tiles, m), jnp.float32)
    by_row = jax.ShapeDtypeStruct((m,), jnp.float32)
    out = plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((m, n), jnp.bfloat16), by_tile, by_tile, by_row),
        scratch_types=gemm.scratch(),
        grid=(min(sms // tile.cluster, row_tiles * tiles.col_tiles),),
        grid_names=("slot",),
        cluster=(tile.below,) if tile.below > 1 else (),
        cluster_names=tile.axes,
        num_threads=tile.warpgroups + 1,
        thread_name="wg",
        kernel_name="bf16_gemm_softmax",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(a, b, targets)
    return Powers(*out)


def store_hits(
    out: Any, values: jax.Array, columns: jax.Array, row: Scalar, on_device: bool
) -> None:
    """out[row + i] = values[i, columns[i]] where there is such a column; values [64, n] in WGMMA's
    layout. Few tiles have a target of a warp's 16 rows: the others pass it over."""
    if not on_device:
        column = jnp.arange(values.shape[1], dtype=jnp.int32)
        found = jnp.where(column == columns[:, None], values, 0).sum(axis=1)
        for i in range(values.shape[0]):

            @pl.when((columns[i] >= 0) & (columns[i] < values.shape[1]))
            def _(i: int = i) -> None:
                out[row + i] = found[i]

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA, WGMMA.reduce(1), SCALAR))
    def store(_: Any, out: ir.Value, values: Any, columns: Any, row: Any) -> None:
        i32, below = ir.IntegerType.get_signless(32), arith.CmpIPredicate.ult
        own = [utils.bitcast(register, i32) for register in columns.registers.flat]
        inside = [arith.cmpi(below, column, utils.c(values.shape[1], i32)) for column in own]
        hit = nvvm.vote_sync(utils.c(-1, i32), functools.reduce(arith.ori, inside), "any")
        with utils.when(hit):
            _store_hits(out, values, columns, row)

    store(out, values, columns, row)


def _store_hits(out: ir.Value, values: Any, columns: Any, row: Any) -> None:
    """A thread has of each of two rows two columns in every 8."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    registers = list(values.to_layout(SINGLE).registers.flat)
    first = arith.muli(arith.remui(utils.thread_idx(), utils.c(4, i32)), utils.c(2, i32))
    (row,) = row.registers.flat
    base = llvm.ptrtoint(i64, utils.memref_ptr(out))
    lines = columns.layout.thread_idxs(columns.shape)
    for part, (column, (line,)) in enumerate(zip(columns.registers.flat, lines, strict=True)):
        own = arith.subi(utils.bitcast(column, i32), first)
        found, there = registers[0], utils.c(0, ir.IntegerType.get_signless(1))
        for i, register in enumerate(registers):
            if i // 2 % 2 == part:
                here = arith.cmpi(arith.CmpIPredicate.eq, own, utils.c(i // 4 * 8 + i % 2, i32))
                found, there = arith.select(here, register, found), arith.ori(there, here)
        at = arith.addi(row, arith.index_cast(i32, line))
        address = arith.addi(base, arith.muli(arith.extsi(i64, at), utils.c(4, i64)))
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address, utils.bitcast(found, i32), arith.extui(i32, there)],
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.b32 [$0], $1; }",
            "l,r,r",
            has_side_effects=True,
        )
