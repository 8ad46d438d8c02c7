"""Results of experts back to their tokens on Hopper in one kernel, pushed by the experts' rank.

What `sm90_expert_combine` does with a kernel that sums the rows of a rank and one that fetches the
sums over NVLink happens here side by side, bit for bit the same: the rank of the experts forms a
token's sum, stores it on the token's rank, and that adds up what arrives. So a sum does not go
through memory before it leaves, and the link is busy from the first sum on.

A CTA has three kinds of threads. One warp fetches rows into a ring of shared memory; a warpgroup
adds them up and leaves the sum in one of `SENDERS` buffers; a warp for each of these stores it in
`staging` [R, T, d] of the token's rank, with one bulk copy. The third warpgroup adds up what other
ranks have sent here. Tokens are taken in chunks, those of all ranks in turn, the next rank's first,
so that at any time all links carry as much.

No row is torn: a sender gives its buffer back when its last store has read it; no group of stores
is empty, none is counted. At the end of a chunk each sender waits until its stores are complete,
written and not just read, and adds 1 to the chunk's counter on the tokens' rank, a release.
R * SENDERS of them, from senders with nothing to send too, say that all of the chunk has arrived;
so nothing is on its way to a rank whose kernel has ended.

No rank waits for good: senders wait for their own CTA's sums and for the hardware, never for a
counter, so all counters fill up once all CTAs run. For that they must run at once: no more CTAs
than SMs, and no other kernel on them that waits for this one. NCCL's do where XLA has one of its
collectives under way on another stream: they wait for their like on other ranks, which may wait for
an SM behind this kernel there. So the usual number of CTAs leaves SMs for all that NCCL takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels import device
from pallas_kernels.checks import ceil_div
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_expert_combine import ONE_AN_SM, Local, Ring, Stages
from pallas_kernels.sm90_expert_push_plan import (
    SENDERS,
    Listed,
    Plan,
    Scalar,
    Turn,
    Visit,
    named,
    walk,
    walk_listed,
)
from pallas_kernels.sm90_peers import Ranks, count_up
from pallas_kernels.sm90_traffic import Traffic, alone

CTAS, SMS = 96, 132  # NCCL takes 32 CTAs at most
CHUNK = 8


@lowered_once
def combine_push(
    y: jax.Array, slots: jax.Array, weights: jax.Array | None, ranks: jax.Array, *, peers: Ranks,
    ctas: int | None = None, chunk: int = CHUNK, ring: Ring = ONE_AN_SM, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out [T, d]: `combine` of all ranks' `reduce_rows`, of bfloat16 y [rows, d], d % 128 == 0.

    slots [R * T, k], weights float32 of that shape or None, ranks [T, R] bool or int32. A token is
    summed here if one of its slots is not negative. `ctas` CTAs a rank take `chunk` tokens at a
    time. Raises ValueError unless they all run at once. Interpreted, sending and adding up are two
    kernels.
    """
    moved = traffic(y, slots, weights, ranks, peers, _resident(ctas, peers), chunk, ring)
    if interpret is None:
        return alone(moved)[1]
    *given, ranks = moved.operands
    plan = Plan.of(peers, ranks.shape[-2], y.shape[-1], chunk)

    def part(function: Callable[..., None], operands: Any, out: Any, **memory: Any) -> Any:
        sent = functools.partial(function, plan)
        half = moved._replace(operands=operands, out=[out], counters=(), **memory)
        return alone(half._replace(run=lambda _, refs, **at: sent(*refs, **at)), interpret)[0]

    sent = part(send_sums, given, moved.out[0])
    return part(add_up, [ranks, sent], moved.out[1], threads=1, memory={}, barriers={})


def traffic(
    y: jax.Array, slots: jax.Array, weights: jax.Array | None, ranks: jax.Array, peers: Ranks,
    ctas: int, chunk: int = CHUNK, ring: Ring = ONE_AN_SM,
) -> Traffic:  # fmt: skip
    """`combine_push`; what it gives comes second."""
    width = y.shape[-1]
    plan = Plan.of(peers, ranks.shape[-2], width, chunk)
    rows = jax.ShapeDtypeStruct((*peers.stacked, plan.tokens, width), y.dtype)
    staging = rows.update(shape=(*peers.stacked, peers.count, plan.tokens, width))
    given = operands(plan, y, slots, weights)

    def run(peers: Ranks, refs: Sequence[Any], **memory: Any) -> None:
        _push(plan._replace(peers=peers), *refs, **memory)

    return Traffic(
        "combine_push", peers, ctas, [*given, ranks.astype(jnp.int32)], [staging, rows],
        *scratch(plan, y.dtype, ring, slots.shape[-1], weights is not None), run, threads=3,
        counters=(("arrived", (*peers.stacked, plan.chunks)),),
    )  # fmt: skip


class Outgoing(NamedTuple):
    """Sums [SENDERS, columns], the barriers of either end, where they go and what counts them."""

    staging: Any
    arrived: Any
    sums: Any
    ready: Any
    free: Any


def operands(plan: Plan, y: jax.Array, slots: jax.Array, *weights: jax.Array | None) -> list[Any]:
    """What the sending threads are given."""
    known = [slots, *(x for x in weights if x is not None)]
    flat = [x.reshape(*plan.peers.stacked, -1) for x in known]
    return [y, *known, *(flat if plan.lists(slots.shape[-1]) else [])]


def scratch(
    plan: Plan, dtype: Any, ring: Ring, choices: int, weighted: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shared memory and barriers of the sending threads."""
    stages = max(1, ring.fitting(plan.columns * dtype.itemsize) - SENDERS)
    barriers = {name: plgpu.Barrier(num_barriers=stages) for name in ("full", "empty")}
    barriers |= {name: plgpu.Barrier(num_barriers=SENDERS) for name in ("ready", "free")}
    rows = dict(ring=stages, sums=SENDERS)
    memory = {name: plgpu.SMEM((count, plan.columns), dtype) for name, count in rows.items()}
    if plan.lists(choices):
        memory["slots"] = plgpu.SMEM((2, plan.chunk * choices), jnp.int32)
        if weighted:
            memory["scale"] = plgpu.SMEM((2, plan.chunk * choices), jnp.float32)
        barriers["asked"] = plgpu.Barrier(num_arrivals=1 + weighted, num_barriers=2)
    return memory, barriers


def _resident(ctas: int | None, peers: Ranks) -> int:
    """CTAs a rank, all of which run at once."""
    sms = backend.get_default_device().core_count if device.is_gpu() else SMS
    most = sms // math.prod(peers.stacked)
    if ctas is not None and not 1 <= ctas <= most:
        raise ValueError(f"ctas is {ctas}: expected 1 to {most}, all of which run at once")
    return ctas or min(CTAS, most)


# --- kernels -----------------------------------------------------------------------------------


def _push(plan: Plan, *refs: Any, arrived: Any, **memory: Any) -> None:
    *operands, ranks, staging, out = refs
    sums, listed, stages, outgoing = _sending(plan, operands, staging, arrived, **memory)

    def wait(chunk: Scalar) -> None:
        counter = plan.peers.own(arrived).at[chunk]
        pl.semaphore_wait(counter, plan.parts, decrement=False)

    wg = lax.axis_index("wg")
    pl.when(wg == 0)(functools.partial(_sum_up, plan, sums, listed, stages, outgoing))
    pl.when(wg == 2)(functools.partial(add_up, plan, ranks, staging, out, wait))
    pl.when(wg == 1)(functools.partial(_move, plan, sums, stages, outgoing))


def send_sums(plan: Plan, *refs: Any, arrived: Any = None, **memory: Any) -> None:
    """The sending threads alone, which are two.

    Three where nothing counts, interpreted: the last stands for all warps that store.
    """
    *operands, staging = refs
    sums, listed, stages, outgoing = _sending(plan, operands, staging, arrived, **memory)
    wg = lax.axis_index("wg")
    pl.when(wg == 0)(functools.partial(_sum_up, plan, sums, listed, stages, outgoing))
    if arrived is not None:
        pl.when(wg == 1)(functools.partial(_move, plan, sums, stages, outgoing))
        return
    pl.when(wg == 1)(functools.partial(_fetch, plan, sums, stages))
    pl.when(wg == 2)(functools.partial(_store, plan, sums, outgoing, None))


def _sending(
    plan: Plan, operands: Any, staging: Any, arrived: Any, *, ring: Any, full: Any, empty: Any,
    slots: Any = None, scale: Any = None, asked: Any = None, **memory: Any,
) -> tuple[Local, Listed | None, Stages, Outgoing]:  # fmt: skip
    y, *known = (plan.peers.own(ref) for ref in operands)
    flat = [] if asked is None else known[len(known) // 2 :]
    known = known[: len(known) - len(flat)]
    rows = Local(y, known[0], known[1] if known[1:] else None, None, None)
    listed = None if asked is None else Listed(flat, [slots, scale][: len(flat)], asked)
    stages = Stages(ring, full, empty, plan.layout)
    return rows, listed, stages, Outgoing(staging, arrived, **memory)


# --- roles -------------------------------------------------------------------------------------


def _move(plan: Plan, sums: Local, stages: Stages, out: Outgoing) -> None:
    """The warps of the threads that fetch and store."""

    @plgpu.warp_map
    def _(warp: Scalar) -> None:
        pl.when(warp == 0)(functools.partial(_fetch, plan, sums, stages))
        pl.when(warp > 0)(functools.partial(_store, plan, sums, out, warp - 1))


def _fetch(plan: Plan, sums: Local, stages: Stages) -> None:
    """The rows of all tokens, one after the other."""
    columns = plan.columns

    def visit(used: Scalar, turn: Turn, choices: Any, _: Any) -> Scalar:
        for choice in choices:

            @pl.when(sums.there(choice))
            def _(choice: Scalar = choice, used: Scalar = used) -> None:
                stages.fetch(used, sums.y.at[choice, pl.ds(turn.piece * columns, columns)])

            used += sums.there(choice).astype(jnp.int32)
        return used

    used = walk(plan, sums._replace(scale=None), visit, jnp.int32(0))
    _drain(stages.empty, stages.ring.shape[0], used)


def _sum_up(plan: Plan, sums: Local, listed: Listed | None, stages: Stages, out: Outgoing) -> None:
    """A token's rows in float32, in the order of choices, rounded once."""

    def visit(used: Scalar, turn: Turn, choices: Any, weights: Any) -> Scalar:
        total, used = stages.add_up(used, [sums.there(choice) for choice in choices], weights)
        pl.when(named(choices))(functools.partial(_hand_over, out, turn.buffer, total))
        return used

    if listed is None:
        walk(plan, sums, visit, jnp.int32(0))
    else:
        walk_listed(plan, sums, listed, visit, jnp.int32(0))
    for buffer in range(SENDERS):
        plgpu.barrier_wait(out.free.at[buffer])


def _hand_over(out: Outgoing, buffer: Scalar, total: jax.Array) -> None:
    plgpu.barrier_wait(out.free.at[buffer])
    out.sums.at[buffer][...] = total.astype(out.sums.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(out.ready.at[buffer])


def _store(plan: Plan, sums: Local, out: Outgoing, sender: Scalar | None) -> None:
    """The sums in one of the buffers to their tokens' ranks; in all where `sender` is None."""
    columns, me = plan.columns, plan.peers.rank()
    for buffer in range(SENDERS) if sender is None else [sender]:
        plgpu.barrier_arrive(out.free.at[buffer])

    def store(turn: Turn) -> None:
        to = plan.peers.of(out.staging, turn.rank).at[me, turn.row]
        plgpu.barrier_wait(out.ready.at[turn.buffer])
        part = pl.ds(turn.piece * columns, columns)
        plgpu.copy_smem_to_gmem(out.sums.at[turn.buffer], to.at[part])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(out.free.at[turn.buffer])

    def visit(carry: Scalar, turn: Turn, choices: Any, _: Any) -> Scalar:
        pl.when(named(choices))(functools.partial(store, turn))
        return carry

    def leave(rank: Scalar, chunk: Scalar) -> None:
        plgpu.wait_smem_to_gmem(0)
        if out.arrived is not None:
            count_up(plan.peers.of(out.arrived, rank).at[pl.ds(chunk, 1)])

    walk(plan, sums._replace(scale=None), visit, jnp.int32(0), leave, sender)


def add_up(
    plan: Plan, ranks: Any, staging: Any, out: Any, wait: Visit = lambda chunk: None
) -> None:
    """What the ranks have sent, in their order: of each chunk as many parts as there are ranks.

    wait(chunk) returns when all of that has arrived.
    """
    ranks, staging, out = (plan.peers.own(ref) for ref in (ranks, staging, out))
    columns, part = plan.columns, ceil_div(plan.chunk, plan.peers.count)

    def add(token: Scalar, piece: Scalar) -> None:
        at = pl.ds(piece * columns, columns)
        total = plgpu.layout_cast(jnp.zeros((columns,), jnp.float32), plan.layout)
        for rank in range(plan.peers.count):
            row = plgpu.load(staging.at[rank, token, at], layout=plan.layout, optimized=False)
            there = lax.broadcast(ranks[token, rank] != 0, total.shape)
            total = jnp.where(there, total + row.astype(jnp.float32), total)
        out.at[token, at][...] = total.astype(out.dtype)

    @pl.loop(0, plan.own())
    def _(i: Scalar) -> None:
        step, chunk = plan.unit(i)
        wait(chunk)
        first, pieces = chunk * plan.chunk, jnp.int32(plan.pieces)
        start, stop = (lax.min((step + n) * part, plan.length(chunk)) * pieces for n in (0, 1))

        @pl.loop(start, stop)
        def _(n: Scalar) -> None:
            add(first + lax.div(n, pieces), lax.rem(n, pieces))


def _drain(barriers: Any, size: int, used: Scalar) -> None:
    """Wait until all of a ring's last stages have been given back."""

    @pl.loop(lax.max(jnp.int32(0), used - size), used)
    def _(n: Scalar) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(n, jnp.int32(size))])
