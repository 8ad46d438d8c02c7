"""What moves between ranks, before it is decided which kernel moves it: its own, or a GEMM's.

A kernel of its own is `alone`; `sm90_beside` gives it some of the CTAs of a GEMM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.in_place import unfused
from pallas_kernels.sm90_peers import Ranks


class Traffic(NamedTuple):
    name: str
    peers: Ranks
    ctas: int
    """How many CTAs of a rank it takes."""
    operands: list[jax.Array]
    out: list[jax.ShapeDtypeStruct]
    memory: dict[str, Any]
    """What a CTA has in shared memory."""
    barriers: dict[str, Any]
    """And semaphores."""
    run: Callable[..., None]
    """run(peers, refs, **memory, **barriers, **counters), with refs of operands and out, is what a
    CTA does; `peers` tell it which it is."""
    threads: int = 1
    """Warpgroups of a CTA, axis "wg" where there are several."""
    counters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Semaphores in global memory that all CTAs share, and their shapes."""

    def opened(self) -> dict[str, Any]:
        """The counters, inside a kernel."""
        return {
            name: pl.get_global(plgpu.SemaphoreType.REGULAR(shape)) for name, shape in self.counters
        }


def alone(traffic: Traffic, interpret: Any = None) -> list[jax.Array]:
    """Its results, by a kernel of its own."""
    peers = traffic.peers

    def kernel(*refs: Any, **scratch: Any) -> None:
        traffic.run(peers, refs, **scratch, **traffic.opened())

    threads = dict(num_threads=traffic.threads, thread_name="wg") if traffic.threads > 1 else {}
    launch = plgpu.kernel(
        kernel, out_type=traffic.out, **peers.grid(traffic.ctas), **threads,
        scratch_types=dict(**traffic.memory, **traffic.barriers),
        kernel_name=traffic.name, interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    return unfused(launch)(*traffic.operands)
