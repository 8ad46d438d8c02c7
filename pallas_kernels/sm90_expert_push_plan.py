"""Which tokens each CTA of `sm90_expert_push` takes, in what order, and how their choices come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import ceil_div
from pallas_kernels.sm90_expert_combine import INSIDE, Local, clamped, columns_of
from pallas_kernels.sm90_peers import Ranks

SENDERS = 3  # warps beside the one that fetches, each with a row on its way
BULK = 4  # words: 16 bytes
Scalar = Any
Visit = Callable[..., Any]


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
        cta, ctas = self.peers.cta(), self.peers.ctas()
        return lax.div(self.peers.count * self.chunks - cta + (ctas - 1), jnp.int32(ctas))

    def unit(self, i: Scalar) -> tuple[Scalar, Scalar]:
        """(step, chunk) of the i-th: each chunk has as many steps as there are ranks.

        All steps are under way at any time, and a CTA's own change from unit to unit.
        """
        ctas, count = self.peers.ctas(), self.peers.count
        number = self.peers.cta() + i * ctas
        chunk = lax.div(number, jnp.int32(count))
        turn = lax.div(chunk * count, jnp.int32(ctas))
        return lax.rem(number + turn, jnp.int32(count)), chunk

    def source(self, me: Scalar, step: Scalar) -> Scalar:
        """The rank whose tokens rank `me` sums in that step."""
        return lax.rem(me + step + 1, jnp.int32(self.peers.count))

    def lists(self, choices: int) -> bool:
        """Whether a unit's choices are a piece of memory that a bulk copy takes."""
        return self.tokens % self.chunk == 0 and self.chunk * choices % BULK == 0

    def length(self, chunk: Scalar) -> Scalar:
        return lax.min(jnp.int32(self.chunk), self.tokens - chunk * self.chunk)


class Turn(NamedTuple):
    """A token's piece, and the buffer through which its sum goes."""

    rank: Scalar
    row: Scalar
    piece: Scalar
    buffer: Scalar


def walk(
    plan: Plan, sums: Local, visit: Visit, start: Any, leave: Visit = lambda rank, chunk: None,
    sender: Scalar | None = None,
) -> Any:  # fmt: skip
    """carry = visit(carry, turn, choices, weights) for the tokens of this CTA's units.

    leave(rank, chunk) ends a unit. A sender takes the turns of its buffer. What is read of a token
    is asked for a turn before; what a unit's tokens have in common is worked out once.
    """
    me = plan.peers.rank()  # between cards a read from memory
    first, every = (0, 1) if sender is None else (sender, SENDERS)

    def unit(i: Scalar) -> tuple[Scalar, Scalar]:
        step, chunk = plan.unit(i)
        return plan.source(me, step), chunk

    def read(rank: Scalar, chunk: Scalar, n: Scalar) -> tuple[Any, Any]:
        row = clamped(chunk * plan.chunk + lax.div(n, jnp.int32(plan.pieces)), plan.tokens - 1)
        token = rank * plan.tokens + row
        return sums.choices(token), sums.weights(token)

    def each(i: Scalar, carry: Any) -> Any:
        carry, (rank, chunk), asked = carry
        following, turns = unit(i + 1), plan.length(chunk) * plan.pieces
        count = lax.div(turns - first + (every - 1), jnp.int32(every))

        def one(j: Scalar, carry: Any) -> Any:
            carry, (choices, weights) = carry
            n = first + j * every
            last = n + every >= turns
            coming = read(
                jnp.where(last, following[0], rank), jnp.where(last, following[1], chunk),
                jnp.where(last, first, n + every),
            )  # fmt: skip
            piece = lax.rem(n, jnp.int32(plan.pieces))
            row = chunk * plan.chunk + lax.div(n, jnp.int32(plan.pieces))
            turn = Turn(rank, row, piece, lax.rem(n, jnp.int32(SENDERS)))
            return visit(carry, turn, choices, weights), coming

        carry, asked = lax.fori_loop(0, count, one, (carry, asked))
        if sender is not None:  # a unit of fewer turns than senders
            asked = lax.cond(count > 0, lambda: asked, lambda: read(*following, first))
        leave(rank, chunk)
        return carry, following, asked

    begin = unit(jnp.int32(0))
    start = start, begin, read(*begin, jnp.int32(first))
    return lax.fori_loop(0, plan.own(), each, start)[0]


def walk_listed(plan: Plan, sums: Local, listed: Listed, visit: Visit, start: Any) -> None:
    """`walk` by choices that come to shared memory a unit ahead."""
    me, own, choices = plan.peers.rank(), plan.own(), sums.slots.shape[1]

    def ask(i: Scalar) -> None:
        step, chunk = plan.unit(i)
        first = plan.source(me, step) * plan.tokens + chunk * plan.chunk
        listed.ask(i, first * choices)

    def each(i: Scalar, carry: Any) -> Any:
        pl.when(i + 1 < own)(functools.partial(ask, i + 1))
        plgpu.barrier_wait(listed.asked.at[lax.rem(i, jnp.int32(2))])
        step, chunk = plan.unit(i)
        rank = plan.source(me, step)

        def one(n: Scalar, carry: Any) -> Any:
            row, piece = (f(n, jnp.int32(plan.pieces)) for f in (lax.div, lax.rem))
            turn = Turn(rank, chunk * plan.chunk + row, piece, lax.rem(n, jnp.int32(SENDERS)))
            return visit(carry, turn, *listed.read(i, row, choices))

        carry = lax.fori_loop(0, plan.chunk * plan.pieces, one, carry)
        plgpu.commit_smem()  # all have read, says this to the next copy but one
        return carry

    pl.when(own > 0)(functools.partial(ask, jnp.int32(0)))
    lax.fori_loop(0, own, each, start)


class Listed(NamedTuple):
    """Choices, and weights if there are any, of this unit's tokens and the next one's.

    Threads that add up would wait for their own reads of memory at every token, where they let bulk
    copies see what they have written.
    """

    all: Any
    """Of all tokens [R * T * k]."""
    here: Any
    """In shared memory [2, chunk * k], in turn."""
    asked: Any

    def ask(self, i: Scalar, first: Scalar) -> None:
        """For unit i, whose choices begin there."""
        place = lax.rem(i, jnp.int32(2))
        for known, to in zip(self.all, self.here, strict=True):
            part = known.at[pl.ds(first, to.shape[1])]
            plgpu.copy_gmem_to_smem(part, to.at[place], self.asked.at[place], oob_mode=INSIDE)

    def read(self, i: Scalar, row: Scalar, choices: int) -> list[tuple[Scalar, ...]]:
        place = lax.rem(i, jnp.int32(2))
        found = [tuple(ref[place, row * choices + j] for j in range(choices)) for ref in self.here]
        return [*found, ()][:2]


def named(choices: Any) -> Scalar:
    """Whether a token has a row here."""
    return functools.reduce(jnp.logical_or, [choice >= 0 for choice in choices])
