"""BF16 weight gradients of groups on Hopper: x[rows of group].T @ dy[rows of group].

Both operands are read as they lie, rows in front: WGMMA takes 16-bit operands transposed. TMA
fetches 64 rows from a multiple of 8 on, so a group's first and last block may hold rows of its
neighbours; the multiplying warpgroups overwrite those with zeros before they use the block.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

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
    empty_barriers,
    extent,
    may_overwrite,
    out_buffers,
    ring,
    store,
    swizzled,
)

BLOCK = 64  # rows of a stage


@dataclasses.dataclass(frozen=True)
class _Wgrad:
    """The kernel's static side; its methods are traced inside the kernel."""

    tile: Tile
    k: int  # columns of x: rows of the output
    n: int
    out_dtype: Any

    def walk(self, sizes: Any, visit: Visit) -> Scalar:
        tiles = extent(self.tile, self.n, 0)
        return sm90_schedule.row_grouped(tiles, self.k, sizes, BLOCK, visit)

    def fetch(self, refs: Refs, work: Work, step: Scalar) -> Scalar:
        tile = self.tile

        def body(i: Scalar, slot: Scalar) -> None:
            @pl.when(step + i >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])
                may_overwrite(refs)  # zeros that threads wrote

            rows = pl.ds(work.first_block + i * BLOCK, BLOCK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.full.at[slot])
            copy(refs.x.at[rows, pl.ds(work.row, tile.height)], refs.x_smem.at[slot])
            copy(refs.dy.at[rows, pl.ds(work.col, tile.width)], refs.dy_smem.at[slot])

        ring(tile, step, work.blocks, body)
        return step + work.blocks

    def clear(self, refs: Refs, wg: Scalar, slot: Scalar, low: Scalar, high: Scalar) -> None:
        """Zeros in the block's rows outside [low, high), a share of the columns a warpgroup."""
        share = self.tile.width // self.tile.warpgroups
        for smem, width in ((refs.x_smem, self.tile.rows), (refs.dy_smem, share)):
            part = smem.at[slot, :, pl.ds(wg * width, width)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, width), 0, layout=plgpu.Layout.WGMMA)
            inside = (row >= low) & (row < high)
            part[...] = jnp.where(inside, values, jnp.zeros_like(values))
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.cleared)
        plgpu.barrier_wait(refs.cleared)

    def multiply(self, refs: Refs, wg: Scalar, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        columns = pl.ds(wg * tile.rows, tile.rows)

        def products(acc: Any) -> jax.Array:
            def body(i: Scalar, slot: Scalar) -> None:
                first = work.first_block + i * BLOCK
                low, high = lax.max(work.start - first, 0), lax.min(work.end - first, BLOCK)
                plgpu.barrier_wait(refs.full.at[slot])

                @pl.when(high - low < BLOCK)
                def _() -> None:
                    self.clear(refs, wg, slot, low, high)

                plgpu.wgmma(acc, refs.x_smem.at[slot, :, columns].T, refs.dy_smem.at[slot])
                plgpu.wgmma_wait(1)  # the products before these have read their stage

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(refs.empty.at[tile.slot(slot + tile.stages - 1)])

            ring(tile, step, work.blocks, body)
            total = acc[...]

            @pl.when(work.blocks > 0)
            def _() -> None:
                last = lax.rem(step + work.blocks - 1, jnp.int32(tile.stages))
                plgpu.barrier_arrive(refs.empty.at[last])

            return total

        total = pl.run_scoped(products, plgpu.ACC((tile.rows, tile.n), jnp.float32))
        out = refs.out.at[work.group]
        row = work.row + wg * tile.rows
        store(refs, out, wg, row, work.col, [total])
        return step + work.blocks

    def scratch(self) -> dict[str, Any]:
        tile, bf16 = self.tile, jnp.bfloat16
        return dict(
            x_smem=swizzled((tile.stages, BLOCK, tile.height), bf16),
            dy_smem=swizzled((tile.stages, BLOCK, tile.width), bf16),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            empty=empty_barriers(tile),
            **out_buffers(tile, self.out_dtype, False),
            cleared=plgpu.Barrier(num_arrivals=tile.warpgroups),
        )


def bf16_grouped_wgrad(
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
    *,
    tile: Tile,
    out_dtype: Any,
    sms: int,
    interpret: Any = None,
) -> jax.Array:
    """[groups, K, N] of x [T, K] and dy [T, N]: T a multiple of 8, K and N of 64."""
    k, n = x.shape[1], dy.shape[1]
    wgrad = _Wgrad(tile, k, n, jnp.dtype(out_dtype))
    out = jax.ShapeDtypeStruct((sizes.shape[0], k, n), out_dtype)
    return launch(wgrad, "bf16_grouped_wgrad", dict(x=x, dy=dy, sizes=sizes), out, sms, interpret)
