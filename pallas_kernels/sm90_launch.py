"""Starting a GEMM on Hopper: one warp fetches, warpgroups multiply, tiles from a walk."""

from __future__ import annotations

import functools
import types
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_schedule import Scalar, Visit, Work
from pallas_kernels.sm90_tile import Tile, keep_row_major

Refs = types.SimpleNamespace


class Gemm(Protocol):
    """The static side of a kernel; its methods are traced inside it."""

    @property
    def tile(self) -> Tile: ...

    def walk(self, sizes: Any, visit: Visit) -> Scalar: ...

    def fetch(self, refs: Refs, work: Work, step: Scalar) -> Scalar: ...

    def multiply(self, refs: Refs, wg: Scalar, work: Work, step: Scalar) -> Scalar: ...

    def scratch(self) -> dict[str, Any]: ...


def launch(
    gemm: Gemm, name: str, operands: dict[str, jax.Array | None], out: jax.ShapeDtypeStruct,
    slots: int, interpret: Any,
) -> jax.Array:  # fmt: skip
    """Run the kernel on `slots` clusters; its refs carry the operands' names, and `out`."""
    tile = gemm.tile
    given = {key: value for key, value in operands.items() if value is not None}

    def kernel(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*given, "out"), refs, strict=True))
        if interpret is None:
            take_over()
        run(gemm, Refs(**named, **scratch, on_device=interpret is None))

    return plgpu.kernel(
        kernel, out_type=out, scratch_types=gemm.scratch(), kernel_name=name, interpret=interpret,
        **grid_of(tile, slots),
    )(*given.values())  # fmt: skip


def grid_of(tile: Tile, slots: int) -> dict[str, Any]:
    """So many clusters, whose SMs have the tile's warpgroups and one that fetches."""
    return dict(
        grid=(slots,),
        grid_names=("slot",),
        cluster=tuple(size for _, size in cluster_of(tile)),
        cluster_names=tile.axes,
        num_threads=tile.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )


def cluster_of(tile: Tile) -> tuple[tuple[str, int], ...]:
    """The axes of a cluster and their sizes."""
    return tuple((axis, {"below": tile.below, "beside": tile.beside}[axis]) for axis in tile.axes)


def take_over() -> None:
    """Wait for what the kernel before has written; the next may start its own set-up while this
    one's last tiles run."""
    plgpu.griddepcontrol_wait()
    plgpu.griddepcontrol_launch_dependents()


def run(gemm: Gemm, refs: Refs) -> None:
    """What an SM of the first `slots` clusters does."""
    tile = gemm.tile
    wg = lax.axis_index("wg")
    sizes = getattr(refs, "sizes", None)

    @pl.when(wg < tile.warpgroups)
    def _() -> None:
        if tile.registers:
            plgpu.set_max_registers(tile.registers[0], action="increase")
        if refs.on_device and hasattr(refs, "rows_smem"):
            keep_row_major(refs.rows_smem)
        gemm.walk(sizes, lambda work, step: gemm.multiply(refs, wg, work, step))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == tile.warpgroups)
    def _() -> None:
        if tile.registers:
            plgpu.set_max_registers(tile.registers[1], action="decrease")
        fetch = functools.partial(_fetch, gemm, refs, sizes)
        if refs.on_device:  # one warp: others would take issue slots and power to no purpose
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(fetch))
        else:
            fetch()


def _fetch(gemm: Gemm, refs: Refs, sizes: Any) -> None:
    stages = gemm.tile.stages
    total = gemm.walk(sizes, lambda work, step: gemm.fetch(refs, work, step))

    # A clustered neighbour may still arrive at these barriers.
    @pl.loop(lax.max(jnp.int32(0), total - stages), total)
    def _(step: Scalar) -> None:
        plgpu.barrier_wait(refs.empty.at[lax.rem(step, jnp.int32(stages))])
