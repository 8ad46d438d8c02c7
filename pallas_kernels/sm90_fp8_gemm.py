"""FP8 GEMM on Hopper: e4m3 operands, block scales, float32 promotion every 128 of K.

One warp fetches tiles of A, B and A's scales with TMA into a ring of stages; warpgroups each
multiply: four WGMMAs into a fresh accumulator, then `sum += scale * accumulator` in registers,
because the tensor core's own accumulator keeps about 14 bits (DeepSeek-V3 report, section 3.3.2).
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
from pallas_kernels.sm90_beside import launch_beside
from pallas_kernels.sm90_fp8_round import BLOCK, Parts, Rounds
from pallas_kernels.sm90_launch import Refs, launch
from pallas_kernels.sm90_schedule import Extent, Scalar, Visit, Work
from pallas_kernels.sm90_tile import (
    ROWS,
    Tile,
    corner,
    empty_barriers,
    extent,
    lines_of,
    may_overwrite,
    out_buffers,
    release,
    ring,
    store,
    swizzled,
)
from pallas_kernels.sm90_traffic import Traffic

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
    slots: int  # clusters that multiply

    @property
    def extent(self) -> Extent:
        blocks = BLOCK if self.kind == "k_grouped" else self.blocks
        return extent(self.tile, self.n, blocks, self.slots)

    def walk(self, sizes: Any, visit: Visit) -> Scalar:
        if self.kind == "k_grouped":
            return sm90_schedule.k_grouped(self.extent, self.rows, sizes, visit)
        splits = self.tile.splits
        return sm90_schedule.rows(self.kind, self.extent, self.rows, splits, sizes, visit)

    def b_group(self, work: Work) -> Scalar:
        return work.group if self.kind in ("grouped", "masked") else 0

    def fetch(self, refs: Refs, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(self.tile, work)
        a_group = work.group if self.kind == "masked" else 0

        def body(i: Scalar, slot: Scalar) -> None:
            @pl.when(step + i >= tile.stages)
            def _() -> None:
                plgpu.barrier_wait(refs.empty.at[slot])
                may_overwrite(refs)  # scales, which threads read

            at = work.first_block + i
            ms, ns, ks = pl.ds(row, tile.height), pl.ds(col, tile.width), pl.ds(at * BLOCK, BLOCK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.full.at[slot])
            copy(refs.a.at[a_group, ms, ks], refs.a_smem.at[slot],
                 collective_axes="beside" if tile.beside > 1 else None)  # fmt: skip
            copy(refs.b.at[self.b_group(work), ns, ks], refs.b_smem.at[slot],
                 collective_axes="below" if tile.below > 1 else None)  # fmt: skip
            scale_rows = pl.ds(a_group * self.rows + row, tile.height)
            copy(refs.a_scale.at[at, scale_rows], refs.a_scale_smem.at[slot])
            if not self.scale_blocks:
                copy(refs.b_scale.at[at, ns], refs.b_scale_smem.at[slot])

        ring(tile, step, work.blocks, body)
        return step + work.blocks

    def multiply(self, refs: Refs, wg: Scalar, work: Work, step: Scalar) -> Scalar:
        tile = self.tile
        row, col = corner(self.tile, work)
        row += wg * tile.rows
        rounds = Rounds(tile, refs, wg, work, row, col, self.b_group(work), self.scale_blocks)
        keep = functools.partial(self.store, refs, wg, work, row, col)
        if self.kind == "k_grouped":
            some, none = (lambda: rounds.sums(step)), (lambda: rounds.initial()[0])
            keep(0, lax.cond(work.blocks > 0, some, none))
        else:
            lax.cond(
                work.end > row,
                lambda: rounds.each(step, keep),
                lambda: release(refs, tile, work, step),
            )
        return step + work.blocks

    def store(
        self, refs: Refs, wg: Scalar, work: Work, row: Scalar, col: Scalar, at: int, total: Parts
    ) -> None:
        """The sums of product number `at` of the tile."""
        tile, ragged = self.tile, self.kind == "grouped"
        down, right = divmod(at, tile.across)
        store(
            refs, refs.out.at[0 if ragged else work.group], wg, row + down * ROWS,
            col + right * tile.n, total, (work.start, work.end) if ragged else None,
            at * tile.n // refs.out_smem.shape[-1],
        )  # fmt: skip

    def scratch(self) -> dict[str, Any]:
        tile, e4m3 = self.tile, jnp.float8_e4m3fn
        found = dict(
            a_smem=swizzled((tile.stages, tile.height, BLOCK), e4m3),
            b_smem=swizzled((tile.stages, tile.width, BLOCK), e4m3),
            a_scale_smem=plgpu.SMEM((tile.stages, tile.height), jnp.float32),
            full=plgpu.Barrier(
                num_arrivals=3 if self.scale_blocks else 4, num_barriers=tile.stages
            ),
            empty=empty_barriers(tile),
            **out_buffers(tile, self.out_dtype, self.kind == "grouped"),
        )
        if not self.scale_blocks:
            found["b_scale_smem"] = plgpu.SMEM((tile.stages, tile.width), jnp.float32)
        return found


def fp8_gemm(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    sizes: jax.Array | None,
    init: jax.Array | None = None,
    *,
    kind: Kind,
    tile: Tile,
    out_dtype: Any,
    sms: int,
    interpret: Any = None,
) -> jax.Array:
    """[groups or splits, M, N], N made up to whole lines of 128 bytes; grouped: [1, M, N].

    a [1, M, K] (masked: [groups, M, K]), a_scale [K / 128, groups * M]; b [groups, N, K] with
    b_scale [groups, N / 128, K / 128], a scale a block, or [K / 128, N], one a row. M and N are
    multiples of 8 (or M < 8), K of 128, the scales' rows of 16 bytes. The output is added to
    `init`, which is as large but for M and N made up to whole tiles.
    """
    operands = dict(a=a, a_scale=a_scale, b=b, b_scale=b_scale, sizes=sizes, init=init)
    return launch(*_kernel(operands, kind, tile, out_dtype, sms), interpret)


def fp8_gemm_beside(
    traffic: Traffic, a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array, *,
    tile: Tile, out_dtype: Any, sms: int, interpret: Any = None,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    """`fp8_gemm` of kind "dense" on `sms` SMs and, on others, what the traffic gives."""
    operands = dict(a=a, a_scale=a_scale, b=b, b_scale=b_scale)
    return launch_beside(*_kernel(operands, "dense", tile, out_dtype, sms), traffic, interpret)


def _kernel(
    operands: dict[str, Any], kind: Kind, tile: Tile, out_dtype: Any, sms: int
) -> tuple[_Gemm, str, dict[str, Any], jax.ShapeDtypeStruct, int]:
    """What `launch` takes."""
    (_, rows, k), (groups, n, _) = operands["a"].shape, operands["b"].shape
    scale, slots = operands["b_scale"], sms // tile.cluster
    tiles = extent(tile, n, k // BLOCK)
    if kind == "dense":
        slots = min(slots, -(-rows // tiles.rows) * tiles.col_tiles * tile.splits)
    outs = {"dense": tile.splits, "grouped": 1, "masked": groups}.get(kind)
    if outs is None:
        outs = 1 if operands["sizes"] is None else operands["sizes"].shape[0]
    gemm = _Gemm(
        kind, tile, rows, n, k // BLOCK, scale.shape[1] if scale.ndim == 3 else 0,
        jnp.dtype(out_dtype), slots,
    )  # fmt: skip
    out = jax.ShapeDtypeStruct((outs, rows, lines_of(n, out_dtype)), out_dtype)
    return gemm, f"fp8_gemm_{kind}", operands, out, slots
