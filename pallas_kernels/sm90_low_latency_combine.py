"""Sums of a decoding step back to their tokens on Hopper: both sides of `sm90_expert_push`, apart.

The threads are those of the kernel that does both. Sums lie in the inbox, and its counters, which
only grow, say when a chunk of them has come.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_expert_push as push
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_expert_combine import ONE_AN_SM, Ring
from pallas_kernels.sm90_low_latency import CTAS, UNMET, Buffers, Plan
from pallas_kernels.sm90_peers import wait_for

Scalar = Any


@lowered_once
def combine_send(
    y: jax.Array, slots: jax.Array, weights: jax.Array, buffers: Buffers, *, plan: Plan,
    ctas: int = CTAS, ring: Ring = ONE_AN_SM, interpret: Any = None,
) -> None:  # fmt: skip
    """The weighted sum of each token's rows of y [E * R * T, d] here, to the token's rank.

    slots int32 [R * T, k], weights float32 of that shape.
    """
    units, told = _units(plan), interpret is None
    memory, barriers = push.scratch(units, y.dtype, ring, slots.shape[-1], True)
    sent = push.operands(units, y, slots, weights)
    given = lax.optimization_barrier(tuple(sent))  # see `in_place`

    def kernel(*refs: Any, **memory: Any) -> None:
        *operands, staging, counters, _ = refs
        counted = dict(arrived=counters) if told else {}
        push.send_sums(units, *operands, staging, **counted, **memory)

    plgpu.kernel(
        kernel, **plan.peers.grid(ctas), num_threads=2 if told else 3, thread_name="wg",
        scratch_types=memory | barriers, kernel_name="combine_send",
        interpret=interpret, compiler_params=UNMET,
    )(*given, buffers.staging, buffers.sums_in, buffers.turns)  # fmt: skip


@lowered_once
def combine_receive(
    ranks: jax.Array, buffers: Buffers, *, plan: Plan, ctas: int = CTAS, interpret: Any = None
) -> jax.Array:
    """out [T, d]: what the ranks with ranks[t, r] (int32 [T, R]) have sent, in their order."""
    units = _units(plan)

    def kernel(ranks: Any, staging: Any, counters: Any, turns: Any, out: Any) -> None:
        turns, counters = plan.peers.own(turns), plan.peers.own(counters)
        turn = turns[1]

        def wait(chunk: Scalar) -> None:
            if interpret is None:
                wait_for(counters.at[pl.ds(chunk, 1)], turn * units.parts)

        push.add_up(units, ranks, staging, out, wait)

        @pl.when(lax.axis_index("cta") == 0)
        def _() -> None:
            turns[0] = turn

    shape = (*plan.peers.stacked, plan.tokens, plan.width)
    found = plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16), **plan.peers.grid(ctas),
        kernel_name="combine_receive", interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(lax.optimization_barrier(ranks), buffers.staging, buffers.sums_in, buffers.turns)  # fmt: skip
    return lax.optimization_barrier(found)


def _units(plan: Plan) -> push.Plan:
    return push.Plan.of(plan.peers, plan.tokens, plan.width, plan.chunk)
