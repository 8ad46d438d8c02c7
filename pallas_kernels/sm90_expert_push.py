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

No row is torn: a sender has one store on its way and waits until that is complete, written and not
just read, before it gives its buffer back: no group of stores is empty, none is counted. At the end
of a chunk each sender adds 1 to the chunk's counter on the tokens' rank, a release after stores
that are complete. R * SENDERS of them, from senders with nothing to send too, say that all of the
chunk has arrived; so nothing is on its way to a rank whose kernel has ended.

No rank waits for good: senders wait for their own CTA's sums and for the hardware, never for a
counter, so all counters fill up once all CTAs run. For that they must run at once: no more CTAs
than SMs, and no other kernel on them that waits for this one. NCCL's do where XLA has one of its
collectives under way on another stream: they wait for their like on other ranks, which may wait for
an SM behind this kernel there. So the usual number of CTAs leaves SMs for all that NCCL takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels import device
from pallas_kernels.checks import ceil_div
from pallas_kernels.in_place import unfused
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_expert_combine import ONE_AN_SM, Local, Ring, Stages, clamped, columns_of
from pallas_kernels.sm90_peers import Ranks, count_up

SENDERS = 3  # warps beside the one that fetches, each with a row on its way
CTAS, SMS = 96, 132  # NCCL takes 32 CTAs at most
CHUNK = 8
Scalar = Any
Visit = Callable[..., Any]


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
    width = y.shape[-1]
    plan = Plan.of(peers, ranks.shape[-2], width, chunk)
    rows = jax.ShapeDtypeStruct((*peers.stacked, plan.tokens, width), y.dtype)
    staging = rows.update(shape=(*peers.stacked, peers.count, plan.tokens, width))
    given, ranks = [y, slots] if weights is None else [y, slots, weights], ranks.astype(jnp.int32)
    common = dict(
        **peers.grid(_resident(ctas, peers)), thread_name="wg", kernel_name="combine_push",
        interpret=interpret, compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    sending = dict(num_threads=3, scratch_types=scratch(plan, y.dtype, ring), **common)

    def kernel(function: Callable[..., None], out: Any, options: Any) -> Any:
        return unfused(plgpu.kernel(functools.partial(function, plan), out_type=out, **options))

    if interpret is None:
        return kernel(_push, [staging, rows], sending)(*given, ranks)[1]
    sent = kernel(send_sums, staging, sending)(*given)
    return kernel(add_up, rows, dict(num_threads=1, **common))(ranks, sent)


class Plan(NamedTuple):
    """Which tokens a CTA takes: units of `chunk` of one rank's tokens, a sum in `pieces`."""

    peers: Ranks
    tokens: int
    chunk: int
    pieces: int
    columns: int
    vector: int

    @classmethod
    def of(cls, peers: Ranks, tokens: int, width: int, chunk: int) -> Plan:
        columns, vector = columns_of(width)
        return cls(peers, tokens, chunk, width // columns, columns, vector)

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WG_STRIDED((self.columns,), self.vector)

    @property
    def chunks(self) -> int:
        return ceil_div(self.tokens, self.chunk)

    @property
    def parts(self) -> int:
        """How often a chunk's counter is raised until all of it has arrived."""
        return self.peers.count * SENDERS

    def own(self) -> Scalar:
        """How many units this CTA has."""
        cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
        return lax.div(self.peers.count * self.chunks - cta + (ctas - 1), jnp.int32(ctas))

    def unit(self, i: Scalar) -> tuple[Scalar, Scalar]:
        """(step, chunk) of the i-th: each chunk has as many steps as there are ranks.

        All steps are under way at any time, and a CTA's own change from unit to unit.
        """
        ctas, count = lax.axis_size("cta"), self.peers.count
        number = lax.axis_index("cta") + i * ctas
        chunk = lax.div(number, jnp.int32(count))
        turn = lax.div(chunk * count, jnp.int32(ctas))
        return lax.rem(number + turn, jnp.int32(count)), chunk

    def source(self, step: Scalar) -> Scalar:
        """The rank whose tokens this one sums in that step."""
        return lax.rem(self.peers.rank() + step + 1, jnp.int32(self.peers.count))

    def length(self, chunk: Scalar) -> Scalar:
        return lax.min(jnp.int32(self.chunk), self.tokens - chunk * self.chunk)


class Outgoing(NamedTuple):
    """Sums [SENDERS, columns], the barriers of either end, where they go and what counts them."""

    staging: Any
    arrived: Any
    sums: Any
    ready: Any
    free: Any


def scratch(plan: Plan, dtype: Any, ring: Ring) -> dict[str, Any]:
    stages = max(1, ring.fitting(plan.columns * dtype.itemsize) - SENDERS)
    barriers = {name: plgpu.Barrier(num_barriers=stages) for name in ("full", "empty")}
    barriers |= {name: plgpu.Barrier(num_barriers=SENDERS) for name in ("ready", "free")}
    rows = dict(ring=stages, sums=SENDERS)
    memory = {name: plgpu.SMEM((count, plan.columns), dtype) for name, count in rows.items()}
    return memory | barriers


def _resident(ctas: int | None, peers: Ranks) -> int:
    """CTAs a rank, all of which run at once."""
    sms = backend.get_default_device().core_count if device.is_gpu() else SMS
    most = sms // math.prod(peers.stacked)
    if ctas is not None and not 1 <= ctas <= most:
        raise ValueError(f"ctas is {ctas}: expected 1 to {most}, all of which run at once")
    return ctas or min(CTAS, most)


# --- kernels -----------------------------------------------------------------------------------


def _push(plan: Plan, *refs: Any, **memory: Any) -> None:
    *operands, ranks, staging, out = refs
    arrived = pl.get_global(plgpu.SemaphoreType.REGULAR((*plan.peers.stacked, plan.chunks)))
    sums, stages, outgoing = _sending(plan, operands, staging, arrived, **memory)

    def wait(chunk: Scalar) -> None:
        counter = plan.peers.own(arrived).at[chunk]
        pl.semaphore_wait(counter, plan.parts, decrement=False)

    wg = lax.axis_index("wg")
    pl.when(wg == 0)(functools.partial(_sum_up, plan, sums, stages, outgoing))
    pl.when(wg == 2)(functools.partial(add_up, plan, ranks, staging, out, wait))
    pl.when(wg == 1)(functools.partial(_move, plan, sums, stages, outgoing))


def send_sums(plan: Plan, *refs: Any, arrived: Any = None, **memory: Any) -> None:
    """The sending threads alone, which are two.

    Three where nothing counts, interpreted: the last stands for all warps that store.
    """
    *operands, staging = refs
    sums, stages, outgoing = _sending(plan, operands, staging, arrived, **memory)
    wg = lax.axis_index("wg")
    pl.when(wg == 0)(functools.partial(_sum_up, plan, sums, stages, outgoing))
    if arrived is not None:
        pl.when(wg == 1)(functools.partial(_move, plan, sums, stages, outgoing))
        return
    pl.when(wg == 1)(functools.partial(_fetch, plan, sums, stages))
    pl.when(wg == 2)(functools.partial(_store, plan, sums, outgoing, None))


def _sending(
    plan: Plan, operands: Any, staging: Any, arrived: Any, *, ring: Any, full: Any, empty: Any,
    **memory: Any,
) -> tuple[Local, Stages, Outgoing]:  # fmt: skip
    y, slots, *scale = (plan.peers.own(ref) for ref in operands)
    rows = Local(y, slots, scale[0] if scale else None, None, None)
    stages = Stages(ring, full, empty, plan.layout)
    return rows, stages, Outgoing(staging, arrived, **memory)


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

    def visit(used: Scalar, token: Scalar, piece: Scalar, choices: Any, _: Any) -> Scalar:
        for choice in choices:

            @pl.when(sums.there(choice))
            def _(choice: Scalar = choice, used: Scalar = used) -> None:
                stages.fetch(used, sums.y.at[choice, pl.ds(piece * columns, columns)])

            used += sums.there(choice).astype(jnp.int32)
        return used

    used = _walk(plan, sums._replace(scale=None), visit, jnp.int32(0))
    _drain(stages.empty, stages.ring.shape[0], used)


def _sum_up(plan: Plan, sums: Local, stages: Stages, out: Outgoing) -> None:
    """A token's rows in float32, in the order of choices, rounded once."""

    def visit(
        carry: Any, token: Scalar, piece: Scalar, choices: Any, weights: Any
    ) -> tuple[Scalar, Scalar]:
        (used, sent), total = carry, stages.zeros()
        for j, choice in enumerate(choices):

            def more(total: jax.Array, used: Scalar = used, j: int = j) -> jax.Array:
                row = stages.take(used)
                return total + (row * weights[j] if weights else row)

            total = lax.cond(sums.there(choice), more, lambda total: total, total)
            used += sums.there(choice).astype(jnp.int32)
        pl.when(_listed(choices))(functools.partial(_hand_over, out, sent, total))
        return used, sent + _listed(choices).astype(jnp.int32)

    _, sent = _walk(plan, sums, visit, (jnp.int32(0), jnp.int32(0)))
    _drain(out.free, SENDERS, sent)


def _hand_over(out: Outgoing, n: Scalar, total: jax.Array) -> None:
    buffer = lax.rem(n, jnp.int32(SENDERS))

    @pl.when(n >= SENDERS)
    def _() -> None:
        plgpu.barrier_wait(out.free.at[buffer])

    out.sums.at[buffer][...] = total.astype(out.sums.dtype)
    plgpu.commit_smem()
    plgpu.barrier_arrive(out.ready.at[buffer])


def _store(plan: Plan, sums: Local, out: Outgoing, sender: Scalar | None) -> None:
    """Every SENDERS-th sum to its token's rank; all of them where `sender` is None."""
    columns = plan.columns

    def store(n: Scalar, token: Scalar, piece: Scalar) -> None:
        buffer = lax.rem(n, jnp.int32(SENDERS))
        rank, row = lax.div(token, jnp.int32(plan.tokens)), lax.rem(token, jnp.int32(plan.tokens))
        to = plan.peers.of(out.staging, rank).at[plan.peers.rank(), row]
        plgpu.barrier_wait(out.ready.at[buffer])
        plgpu.copy_smem_to_gmem(out.sums.at[buffer], to.at[pl.ds(piece * columns, columns)])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(out.free.at[buffer])

    def visit(sent: Scalar, token: Scalar, piece: Scalar, choices: Any, _: Any) -> Scalar:
        mine = _listed(choices)
        if sender is not None:
            mine &= lax.rem(sent, jnp.int32(SENDERS)) == sender
        pl.when(mine)(functools.partial(store, sent, token, piece))
        return sent + _listed(choices).astype(jnp.int32)

    def leave(rank: Scalar, chunk: Scalar) -> None:
        if out.arrived is not None:
            count_up(plan.peers.of(out.arrived, rank).at[pl.ds(chunk, 1)])

    _walk(plan, sums._replace(scale=None), visit, jnp.int32(0), leave)


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


# --- steps -------------------------------------------------------------------------------------


def _walk(
    plan: Plan, sums: Local, visit: Visit, start: Any, leave: Visit = lambda rank, chunk: None
) -> Any:
    """carry = visit(carry, token, piece, choices, weights) for the tokens of this CTA's units.

    leave(rank, chunk) ends a unit. What is read of a token is asked for a step before.
    """

    def read(i: Scalar, n: Scalar) -> tuple[Scalar, Any, Any]:
        step, chunk = plan.unit(i)
        row = chunk * plan.chunk + lax.div(n, jnp.int32(plan.pieces))
        token = plan.source(step) * plan.tokens + clamped(row, plan.tokens - 1)
        return token, sums.choices(token), sums.weights(token)

    def unit(i: Scalar, carry: Any) -> Any:
        step, chunk = plan.unit(i)
        rows = plan.length(chunk) * plan.pieces

        def one(n: Scalar, carry: Any) -> Any:
            carry, (token, choices, weights) = carry
            last = n + 1 >= rows
            coming = read(i + last.astype(jnp.int32), jnp.where(last, 0, n + 1))
            piece = lax.rem(n, jnp.int32(plan.pieces))
            return visit(carry, token, piece, choices, weights), coming

        carry = lax.fori_loop(0, rows, one, carry)
        leave(plan.source(step), chunk)
        return carry

    first = read(jnp.int32(0), jnp.int32(0))
    return lax.fori_loop(0, plan.own(), unit, (start, first))[0]


def _listed(choices: Any) -> Scalar:
    return functools.reduce(jnp.logical_or, [choice >= 0 for choice in choices])


def _drain(barriers: Any, size: int, used: Scalar) -> None:
    """Wait until all of a ring's last stages have been given back."""

    @pl.loop(lax.max(jnp.int32(0), used - size), used)
    def _(n: Scalar) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(n, jnp.int32(size))])
