"""BF16 GEMM on Hopper: dense, by groups of rows, and masked; the FP8 kernel's simpler twin.

The same ring of stages and walk over tiles; the accumulator stays in the tensor core's registers
for the whole of K, so a warpgroup's products across are up to 256 wide.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_schedule
from pallas_kernels.sm90_launch import Refs, launch
from pallas_kernels.sm90_schedule import Scalar, Visit, Work
from pallas_kernels.sm90_tile import (
    Tile,
    corner,
    empty_barriers,
    extent,
    lines_of,
    out_buffers,
    release,
    ring,
    store,
    swizzled,
)

BLOCK = 64  # of K: 128 bytes, one stage
Kind = Literal["dense", "grouped", "masked"]


@dataclasses.dataclass(frozen=True)
class _Gemm:
    """The kernel's static side; its methods are traced inside the kernel."""

    kind: Kind
    tile: Tile
    rows: int  # of A; of a group of A when masked
    n: int
    blocks: int
    out_dtype: Any
    b_by_k: bool  # b is [groups, K, N]: WGMMA takes 16-bit operands either way round

    def walk(self, sizes: Any, visit: Visit) -> Scalar:
        tiles = extent(self.tile, self.n, self.blocks)
        return sm90_schedule.rows(self.kind, tiles, self.rows, self.tile.splits, sizes, visit)

    def fetch(self, refs: Refs, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(tile, work)
        a_group = work.group if self.kind == "masked" else 0
        b_group = 0 if self.kind == "dense" else work.group

        def body(i: Scalar, slot: Scalar) -> None:
            @pl.when(step + i >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])

            ms, ns, ks = pl.ds(row, tile.height), pl.ds(col, tile.width), pl.ds(i * BLOCK, BLOCK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.full.at[slot])
            copy(refs.a.at[a_group, ms, ks], refs.a_smem.at[slot],
                 collective_axes="beside" if tile.beside > 1 else None)  # fmt: skip
            b = refs.b.at[b_group, ks, ns] if self.b_by_k else refs.b.at[b_group, ns, ks]
            copy(b, refs.b_smem.at[slot], collective_axes="below" if tile.below > 1 else None)

        ring(tile, step, work.blocks, body)
        return step + work.blocks

    def multiply(self, refs: Refs, wg: Scalar, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(tile, work)
        row += wg * tile.rows
        a_rows = pl.ds(wg * tile.rows, tile.rows)

        def products(acc: Any) -> jax.Array:
            def body(i: Scalar, slot: Scalar) -> None:
                plgpu.barrier_wait(refs.full.at[slot])
                b = refs.b_smem.at[slot]
                plgpu.wgmma(acc, refs.a_smem.at[slot, a_rows], b if self.b_by_k else b.T)
                plgpu.wgmma_wait(1)  # the products before these have read their stage

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(refs.empty.at[tile.slot(slot + tile.stages - 1)])

            ring(tile, step, work.blocks, body)
            total = acc[...]
            last = lax.rem(step + work.blocks - 1, jnp.int32(tile.stages))
            plgpu.barrier_arrive(refs.empty.at[last])
            return total

        def compute() -> None:
            total = pl.run_scoped(products, plgpu.ACC((tile.rows, tile.n), jnp.float32))
            out = refs.out.at[0 if self.kind == "grouped" else work.group]
            ragged = (work.start, work.end) if self.kind == "grouped" else None
            store(refs, out, wg, row, col, [total], ragged)

        lax.cond(work.end > row, compute, lambda: release(refs, tile, work, step))
        return step + work.blocks

    def scratch(self) -> dict[str, Any]:
        tile, bf16 = self.tile, jnp.bfloat16
        b = (BLOCK, tile.width) if self.b_by_k else (tile.width, BLOCK)
        found = dict(
            a_smem=swizzled((tile.stages, tile.height, BLOCK), bf16),
            b_smem=swizzled((tile.stages, *b), bf16),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            empty=empty_barriers(tile),
            **out_buffers(tile, self.out_dtype, self.kind == "grouped"),
        )
        return found


def bf16_gemm(
    a: jax.Array,
    b: jax.Array,
    sizes: jax.Array | None,
    *,
    kind: Kind,
    tile: Tile,
    out_dtype: Any,
    sms: int,
    b_by_k: bool = False,
    interpret: Any = None,
) -> jax.Array:
    """[groups, M, N] (grouped: [1, M, N]), N made up to whole lines of 128 bytes, of
    a [1, M, K] (masked: [groups, M, K]) and b [groups, N, K], or [groups, K, N] when `b_by_k`.
    M and N are multiples of 8 (or M < 8), K of 64; N of 64 too when b lies by K."""
    rows, k = a.shape[1:]
    groups, n = b.shape[0], b.shape[2 if b_by_k else 1]
    gemm = _Gemm(kind, tile, rows, n, k // BLOCK, jnp.dtype(out_dtype), b_by_k)
    tiles = extent(tile, n, gemm.blocks)
    slots = sms // tile.cluster
    if kind == "dense":
        slots = min(slots, -(-rows // tiles.rows) * tiles.col_tiles)
    outs, columns = groups if kind == "masked" else 1, lines_of(n, out_dtype)
    out = jax.ShapeDtypeStruct((outs, rows, columns), out_dtype)
    return launch(gemm, f"bf16_gemm_{kind}", dict(a=a, b=b, sizes=sizes), out, slots, interpret)
