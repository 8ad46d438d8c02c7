"""A GEMM on most SMs and an exchange between ranks on the others, in one kernel on Hopper.

The last clusters of the grid move rows while the first multiply, so what crosses the links costs
the product a few SMs and no time of its own. Two kernels on two streams would do the same if the
second found room: a GEMM that is alone takes every SM, and XLA starts kernels one by one.

Shared memory is either side's, never both's. Nothing that multiplies waits for what moves, so
however few SMs there are, CTAs that wait for other ranks run at last.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import ceil_div
from pallas_kernels.in_place import unfused
from pallas_kernels.sm90_launch import Gemm, Refs, cluster_of, grid_of, run, take_over
from pallas_kernels.sm90_peers import Peers, Slots
from pallas_kernels.sm90_traffic import Traffic

REGISTERS = 512  # of the 128 threads of a warpgroup, if it had the SM's to itself


def launch_beside(
    gemm: Gemm, name: str, operands: dict[str, jax.Array], out: jax.ShapeDtypeStruct, slots: int,
    traffic: Traffic, interpret: Any = None,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    """`launch`, and what the traffic gives, moved by whole clusters behind the first `slots`."""
    tile, clusters = gemm.tile, ceil_div(traffic.ctas, gemm.tile.cluster)
    peers = _last(traffic, Slots(slots, clusters, cluster_of(tile)))
    memory, barriers = _divided(gemm.scratch())

    def kernel(*refs: Any, memory: Any, multiplying: Any, moving: Any) -> None:
        mine, theirs = refs[: len(operands)], refs[len(operands) : -1 - len(traffic.out)]
        product, *moved = refs[-1 - len(traffic.out) :]
        tiles, rows = memory
        named = Refs(
            **dict(zip(operands, mine, strict=True)), out=product, **tiles, **multiplying,
            on_device=interpret is None,
        )  # fmt: skip
        counters = traffic.opened()
        if interpret is None:
            take_over()

        def move() -> None:
            if interpret is None:  # what it has; else ptxas goes by those of the fetching threads
                plgpu.set_max_registers(
                    REGISTERS // (tile.warpgroups + 1) // 8 * 8, action="increase"
                )
            traffic.run(peers, [*theirs, *moved], **rows, **moving, **counters)

        first = lax.axis_index("slot") < slots
        pl.when(first)(functools.partial(run, gemm, named))
        pl.when(~first & (lax.axis_index("wg") < traffic.threads))(move)

    launch = plgpu.kernel(
        kernel, out_type=[out, *traffic.out], kernel_name=f"{name}_beside_{traffic.name}",
        scratch_types=dict(
            memory=plgpu.RefUnion(memory, traffic.memory), multiplying=barriers,
            moving=traffic.barriers,
        ),
        interpret=interpret, **grid_of(tile, slots + clusters),
    )  # fmt: skip
    product, *moved = unfused(launch)(*operands.values(), *traffic.operands)
    return product, moved


def _last(traffic: Traffic, slots: Slots) -> Peers:
    if not isinstance(traffic.peers, Peers):
        raise TypeError(f"ranks are {traffic.peers}: a GEMM is of one device each")
    return dataclasses.replace(traffic.peers, slots=slots)


def _divided(scratch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shared memory, and barriers."""
    barriers = {
        name: found
        for name, found in scratch.items()
        if isinstance(found, plgpu.Barrier | plgpu.ClusterBarrier)
    }
    memory = {name: found for name, found in scratch.items() if name not in barriers}
    return memory, barriers
