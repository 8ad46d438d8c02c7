"""Paged MLA decode on Hopper: 64 query rows against latents, which are keys and values in one.

* Output of 64 x 512 fills half of an SM's registers, so two warpgroups hold a half of its columns
  each. Pages are taken in pairs: warpgroup w makes the scores of page w, hands its weights to the
  other through shared memory, and both add up their columns of both pages. The running maximum
  goes from one to the other and back ("seesaw", as FlashMLA does it).
* The part of the query with position stays in registers; its place in shared memory then takes the
  weights of the first page.
* A block of heads (of speculated tokens too) is a row block; two of them may be a cluster, whose
  SMs share every page by TMA multicast.
* An SM works through the pieces of requests that `sm90_mla_plan` deals it, and fetches pages of the
  next piece while it finishes the last one.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import ceil_div
from pallas_kernels.sm90_mla_gather import gather_all
from pallas_kernels.sm90_mla_pages import (
    HALF,
    LATENT,
    PAGE,
    PARTS,
    QUARTER,
    QUARTERS,
    QUEUES,
    ROPE,
    ROWS,
    Decode,
    Scalar,
    fetch_all,
    pieces,
)
from pallas_kernels.sm90_mla_plan import STEP, Plan
from pallas_kernels.sm90_mla_steps import attend
from pallas_kernels.sm90_tile import swizzled

REGISTERS = dict(pages=(232, 40), tokens=(208, 88), chosen=(208, 88))  # math, fetching: 504 in all


def decode(
    q: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array, plan: Plan, call: Decode,
    *, interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Requests in one piece: out [b, rows', 512] and lse [b, rows]; those in several have theirs in
    partial out float32 [2 parts, rows", 512] and lse (base 2) [2 parts, rows"] for `combine`.

    q is [b, rows, 576]; rows' and rows" are rows filled up.
    """
    b = q.shape[0]
    # TMA wants whole tiles of 8 rows, the interpreter whole blocks.
    unit = 8 if interpret is None else ROWS
    rows = ceil_div(call.rows, unit) * unit
    q = jnp.pad(q, ((0, 0), (0, rows - call.rows), (0, 0)))
    partial = 2 * plan.parts

    def kernel(q, cache, table, lengths, starts, _, __, out, lse, part_out, part_lse, **scratch):
        refs = types.SimpleNamespace(
            q=q, cache=cache, table=table, lengths=lengths, starts=starts, out=out, lse=lse,
            part_out=part_out, part_lse=part_lse, on_device=interpret is None, **scratch,
        )  # fmt: skip
        refs.q_s, refs.staged_s, refs.sums_s = scratch["first"]
        _run(call, refs)

    barrier = plgpu.Barrier
    emptied = functools.partial(
        plgpu.ClusterBarrier, collective_axes=("pair",), num_arrivals=1
    ) if call.pair else barrier  # fmt: skip
    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((b, rows, LATENT), q.dtype),
            jax.ShapeDtypeStruct((b, call.rows), jnp.float32),
            jax.ShapeDtypeStruct((partial, rows, LATENT), jnp.float32),
            jax.ShapeDtypeStruct((partial, call.blocks * ROWS), jnp.float32),
        ),
        scratch_types=dict(
            first=plgpu.RefUnion(  # the query, and then output on its way out
                swizzled((2, ROWS, HALF), q.dtype),
                swizzled((2, ROWS, HALF), q.dtype),
                swizzled((2, ROWS, QUARTER), jnp.float32),
            ),
            weights_s=swizzled((2, ROWS, ROPE), q.dtype),
            latent_s=swizzled((2 * QUARTERS, PAGE, QUARTER), q.dtype),
            rope_s=swizzled((2, PAGE, ROPE), q.dtype),
            rows_s=plgpu.SMEM((4, ROWS), jnp.float32),
            q_full=barrier(num_arrivals=2),
            key_full=barrier(),
            q_empty=barrier(num_arrivals=2),
            q_held=barrier(),
            full=barrier(num_barriers=2 * PARTS),
            **({} if call.source == "pages" else dict(places_s=plgpu.SMEM((2 * STEP,), jnp.int32))),
            empty=emptied(num_barriers=2 * PARTS),
            bound_full=barrier(num_barriers=2),
            weights_full=barrier(num_barriers=2),
            sum_full=barrier(num_barriers=2),
        ),
        grid=(call.blocks // (1 + call.pair), plan.parts),
        grid_names=("block", "part"),
        cluster=(2,) if call.pair else (),
        cluster_names=("pair",) if call.pair else (),
        num_threads=3,
        thread_name="wg",
        kernel_name="mla_decode",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(q, cache, table, lengths, *plan)


def _run(call: Decode, refs: Any) -> None:
    wg = lax.axis_index("wg")
    if refs.on_device:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()

    for number in range(2):

        @pl.when(wg == number)
        def _(number: int = number) -> None:
            plgpu.set_max_registers(REGISTERS[call.source][0], action="increase")
            pieces(refs, functools.partial(attend, call, refs, number))

    @pl.when(wg == 2)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[call.source][1], action="decrease")
        if call.source != "pages":
            gather_all(call, refs)
            return
        if not refs.on_device:
            fetch_all(call, refs, None)
            return

        @plgpu.warp_map
        def _(warp: Scalar) -> None:
            for number in range(len(QUEUES)):
                pl.when(warp == number)(functools.partial(fetch_all, call, refs, number))
