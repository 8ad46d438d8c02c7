"""What the links between Hopper GPUs can do at most: rows moved for the sake of moving.

Both kernels walk over all other ranks in turn, all ranks at once, with nothing but bulk copies
between shared memory and another rank's memory, as those of `sm90_expert_dispatch` have to make
them. `loads` keeps what it fetched last, `stores` sends the same row again and again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.in_place import unfused
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import Ranks

SMEM, MOST_STAGES = 192 << 10, 24
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
Scalar = Any


@lowered_once
def loads(
    x: jax.Array, *, ctas: int, peers: Ranks, stages: int | None = None, interpret: Any = None
) -> jax.Array:
    """out [ctas, stages, w]: of all rows of all other ranks' x [rows, w] those fetched last.

    `last_loaded` says which. A row is a multiple of 16 bytes, of 128 if it shall be fast. Raises
    ValueError for less than two ranks.
    """
    _check(peers)
    rows, width = x.shape[-2:]
    stages = stages or max(1, min(MOST_STAGES, SMEM // (width * x.dtype.itemsize)))
    out = jax.ShapeDtypeStruct((*peers.stacked, ctas, stages, width), x.dtype)

    def kernel(x: Any, out: Any, ring: Any, full: Any, done: Any = None) -> None:
        total = _own_rows(rows) * (peers.count - 1)

        def fetch(n: Scalar) -> None:
            rank, row = _item(n, peers)
            stage = lax.rem(n, jnp.int32(stages))
            plgpu.copy_gmem_to_smem(
                peers.of(x, rank).at[row], ring.at[stage], full.at[stage], oob_mode=INSIDE
            )

        def keep(stage: int) -> None:
            plgpu.copy_smem_to_gmem(ring.at[stage], peers.own(out).at[lax.axis_index("cta"), stage])

        for n in range(stages):
            pl.when(n < total)(lambda n=n: fetch(jnp.int32(n)))

        @pl.loop(jnp.int32(0), total)
        def _(n: Scalar) -> None:
            plgpu.barrier_wait(full.at[lax.rem(n, jnp.int32(stages))])
            pl.when(n + stages < total)(lambda: fetch(n + stages))

        for stage in range(stages):
            pl.when(stage < total)(lambda stage=stage: keep(stage))
        plgpu.wait_smem_to_gmem(0)
        peers.finish(done)

    launch = plgpu.kernel(
        kernel, out_type=out, **peers.grid(ctas), kernel_name="link_loads", interpret=interpret,
        scratch_types=dict(
            ring=plgpu.SMEM((stages, width), x.dtype), full=plgpu.Barrier(num_barriers=stages),
            **peers.semaphores(),
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    return unfused(launch)(x)


@lowered_once
def stores(x: jax.Array, *, rows: int, peers: Ranks, interpret: Any = None) -> jax.Array:
    """out [R * rows, w] with out[s * rows + i] = row i % ctas of rank s's x [ctas, w], s not here.

    The rows of a rank itself stay unwritten. Sizes and errors are those of `loads`.
    """
    _check(peers)
    ctas, width = x.shape[-2:]
    out = jax.ShapeDtypeStruct((*peers.stacked, peers.count * rows, width), x.dtype)

    def kernel(x: Any, out: Any, row: Any, full: Any, done: Any = None) -> None:
        plgpu.copy_gmem_to_smem(peers.own(x).at[lax.axis_index("cta")], row, full, oob_mode=INSIDE)
        plgpu.barrier_wait(full)

        @pl.loop(jnp.int32(0), _own_rows(rows) * (peers.count - 1))
        def _(n: Scalar) -> None:
            rank, place = _item(n, peers)
            plgpu.copy_smem_to_gmem(row, peers.of(out, rank).at[peers.rank() * rows + place])

        plgpu.wait_smem_to_gmem(0)
        peers.finish(done)

    launch = plgpu.kernel(
        kernel, out_type=out, **peers.grid(ctas), kernel_name="link_stores", interpret=interpret,
        scratch_types=dict(
            row=plgpu.SMEM((width,), x.dtype), full=plgpu.Barrier(), **peers.semaphores()
        ),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    return unfused(launch)(x)


def last_loaded(
    rows: int, ctas: int, stages: int, ranks: int, me: Scalar
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(rank, row, whether there is one) of each row [ctas, stages] that `loads` gives rank me."""
    cta = jnp.arange(ctas, dtype=jnp.int32)[:, None]
    stage, others = jnp.arange(stages, dtype=jnp.int32), ranks - 1
    total = (rows - cta + ctas - 1) // ctas * others
    n = stage + (total - 1 - stage) // stages * stages
    rank = (me + 1 + (n % others + cta) % others) % ranks
    return rank, cta + n // others * ctas, stage < total


def _check(peers: Ranks) -> None:
    if peers.count < 2:
        raise ValueError(f"ranks are {peers.count}: a link is between two or more")


def _own_rows(rows: int) -> Scalar:
    """Of this CTA, which has every ctas-th."""
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
    return lax.div(rows - cta + (ctas - 1), jnp.int32(ctas))


def _item(n: Scalar, peers: Ranks) -> tuple[Scalar, Scalar]:
    """The rank and the row of this CTA's n-th copy: its neighbours turn to other ranks first."""
    cta, others = lax.axis_index("cta"), jnp.int32(peers.count - 1)
    step = lax.rem(lax.rem(n, others) + cta, others)
    rank = lax.rem(peers.rank() + 1 + step, jnp.int32(peers.count))
    return rank, cta + lax.div(n, others) * lax.axis_size("cta")
