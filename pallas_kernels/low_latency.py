"""The exchange of a decoding step: few tokens to the ranks of their experts and back, in halves.

DeepEP's low-latency dispatch and combine (github.com/deepseek-ai/DeepEP) for a program that runs
under `jax.shard_map`, given `check_vma=False`: `axis` names the mesh's R ranks, of which each has T
tokens and E experts, the first rank the first ones. A round on an inbox, opened once a program:

  inbox = open_inbox(T, d, k, E, axis=...)
  sent = dispatch_send(inbox, x, experts, weights)    tokens leave in FP8
  got = dispatch_receive(inbox, sent)                 rows of this rank's experts
  sent = combine_send(inbox, y, got)                  sums of their results leave
  out = combine_receive(inbox, sent)                  [T, d]

The first of two halves returns at once, and what is sent crosses while others work: between halves
the caller may do anything else, such as halves of another micro-batch with an inbox of its own.
Every rank must call all four, in this order, in each round on an inbox; there may be as many rounds
as one likes, in loops too, but they have to lie in the program that opened it, of which it is not a
result. A rank with nothing to send calls them with choices of -1.

Token t of rank s has the number s * T + t everywhere. Here a token crosses once to each rank that
has an expert of it, not once for each expert. `backend="auto"` takes the Hopper kernels where they
apply, which is within one process, and plain jnp elsewhere, where `sent` carries the values and the
inbox holds nothing. Rows that are nobody's are unspecified in operands and results. Repeated runs
give the same bits. Differentiating raises TypeError.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, gemm_backend
from pallas_kernels import expert_exchange as exchange
from pallas_kernels.expert_layout import slots_by_expert
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.permute import MOST_CHOICES, SUM_STEP
from pallas_kernels.quantize import quantize_tiles

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32

    from pallas_kernels.sm90_low_latency import Buffers, Plan
    from pallas_kernels.sm90_peers import Peers

CHUNK = 2
"""Tokens whose sums are counted together: so few that all CTAs have some of 128."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inbox:
    """Where other ranks store tokens and sums for this one."""

    tokens: int = dataclasses.field(metadata=dict(static=True))
    """T, of each rank."""
    width: int = dataclasses.field(metadata=dict(static=True))
    choices: int = dataclasses.field(metadata=dict(static=True))
    experts: int = dataclasses.field(metadata=dict(static=True))
    """E, of each rank."""
    axis: exchange.Axis = dataclasses.field(metadata=dict(static=True))
    ctas: int | None = dataclasses.field(metadata=dict(static=True))
    plan: Plan | None = dataclasses.field(metadata=dict(static=True))
    """Of the kernels, None for jnp."""
    buffers: Buffers | None

    @property
    def rows(self) -> int:
        """R * T."""
        return lax.axis_size(self.axis) * self.tokens

    @property
    def options(self) -> dict[str, Any]:
        """Of a kernel."""
        return dict(plan=self.plan) | ({} if self.ctas is None else dict(ctas=self.ctas))


class Sent(NamedTuple):
    """Tokens on their way."""

    ranks: Int32[Array, "T R"]
    """Which ranks have a row of each of the own tokens."""
    tokens: tuple[jax.Array, ...] = ()
    """q, scale, experts and weights of the own tokens, without an inbox that holds them."""


class Received(NamedTuple):
    """Rows by expert, in the order of ranks and of their tokens, for `fp8_masked_gemm`."""

    q: Float8e4m3fn[Array, "E R*T d"]
    """Rows past an expert's count are unspecified."""
    scale: Float32[Array, "E R*T tiles"]
    counts: Int32[Array, " E"]
    slots: Int32[Array, "R*T k"]
    """e * R * T + the row with expert e, -1 for choices that are not this rank's.

    A token that names an expert twice has one row there."""
    weights: Float32[Array, "R*T k"]
    """Of all tokens, as `slots`."""
    ranks: Int32[Array, "T R"]
    """As in `Sent`."""


class SentSums(NamedTuple):
    """Sums on their way."""

    ranks: Int32[Array, "T R"]
    sums: jax.Array | None = None
    """[R * T, d], without an inbox that holds them."""


def open_inbox(
    tokens: int,
    width: int,
    choices: int,
    experts: int,
    *,
    axis: exchange.Axis,
    ctas: int | None = None,
    chunk: int = CHUNK,
    backend: Backend = "auto",
) -> Inbox:
    """An inbox for T = `tokens` of d = `width`, k = `choices`, and E = `experts` on each rank.

    `ctas` is how many SMs each kernel takes. Raises ValueError for numbers below 1 and on an axis
    that jax.shard_map does not map, and for backend="mosaic_gpu" on d that is not divisible by 128,
    on k above 32, on more tokens than shared memory has room for (256 on each of 8 ranks fit, with
    64 experts), in programs of several processes, and where jax.shard_map leaves axes to XLA.
    """
    numbers = dict(tokens=tokens, width=width, choices=choices, experts=experts, chunk=chunk)
    for name, number in (numbers | ({} if ctas is None else dict(ctas=ctas))).items():
        if number < 1:
            raise ValueError(f"{name} is {number}: expected 1 or more")
    exchange.rank_count(axis)
    given = tokens, width, choices, experts
    if (peers := _peers(backend, axis, *given)) is None:
        return Inbox(*given, axis, ctas, None, None)
    from pallas_kernels import sm90_low_latency as sm90

    plan = sm90.Plan(peers, *given, ctas or sm90.CTAS, chunk)
    return Inbox(*given, axis, ctas, plan, sm90.open_buffers(plan))


def dispatch_send(
    inbox: Inbox,
    x: BFloat16[Array, "T d"],
    experts_TK: Int32[Array, "T k"],
    weights_TK: Float32[Array, "T k"],
    *,
    power_of_two: bool = False,
) -> Sent:
    """This rank's tokens to the ranks of their experts, cast by `quantize_tiles` on their way.

    experts_TK count the experts of all ranks; one outside of [0, R * E), such as -1, is none.
    weights_TK come out beside the tokens, for `combine_send`. Raises ValueError on other inputs.
    """
    checks.exact("x", x, (inbox.tokens, inbox.width), jnp.bfloat16)
    chosen = inbox.tokens, inbox.choices
    checks.exact("experts_TK", experts_TK, chosen, jnp.int32)
    checks.exact("weights_TK", weights_TK, chosen)
    x, weights_TK = exchange.constant(x), exchange.constant(weights_TK)
    if inbox.buffers is not None:
        from pallas_kernels import sm90_low_latency as sm90

        options = dict(plan=inbox.plan, power_of_two=power_of_two)
        return Sent(sm90.dispatch_send(x, experts_TK, weights_TK, inbox.buffers, **options))
    cast = quantize_tiles(x, power_of_two=power_of_two, backend="reference")
    return Sent(_wanted(inbox, experts_TK), (*cast, experts_TK, weights_TK))


def dispatch_receive(inbox: Inbox, sent: Sent) -> Received:
    """Wait for the tokens of all ranks and give them rows with this rank's experts."""
    if inbox.buffers is not None:
        from pallas_kernels import sm90_low_latency_receive as sm90

        return Received(*sm90.dispatch_receive(inbox.buffers, **inbox.options), sent.ranks)
    q, scale, experts, weights = sent.tokens
    first = lax.axis_index(inbox.axis) * inbox.experts
    experts, weights = (exchange.everyones(part, inbox.axis) for part in (experts, weights))
    slots, counts = slots_by_expert(experts, first, inbox.experts)
    of = exchange.tokens_of(slots, inbox.experts * inbox.rows)
    q, scale = (
        exchange.everyones(part, inbox.axis, of).reshape(inbox.experts, inbox.rows, -1)
        for part in (q, scale)
    )
    return Received(q, scale, counts, slots, weights, sent.ranks)


def combine_send(inbox: Inbox, y: BFloat16[Array, "E R*T d"], got: Received) -> SentSums:
    """For each token the sum of its rows of y, times weights, to the token's rank.

    In float32, in the order of choices, rounded once. Raises ValueError on other inputs.
    """
    checks.exact("y", y, (inbox.experts, inbox.rows, inbox.width), jnp.bfloat16)
    y = exchange.constant(y.reshape(-1, inbox.width))
    if inbox.buffers is not None:
        from pallas_kernels import sm90_low_latency_combine as sm90

        sm90.combine_send(y, got.slots, got.weights, inbox.buffers, **inbox.options)
        return SentSums(got.ranks)
    every, count = jnp.arange(inbox.rows, dtype=jnp.int32), jnp.full(1, inbox.rows, jnp.int32)
    layout = got.slots, got.weights, every, count
    return SentSums(got.ranks, exchange.reduce_rows(y, *layout, backend="reference"))


def combine_receive(inbox: Inbox, sent: SentSums) -> BFloat16[Array, "T d"]:
    """Wait for the sums of all ranks and add them up in float32, in the order of ranks."""
    if sent.sums is None:
        from pallas_kernels import sm90_low_latency_combine as sm90

        return sm90.combine_receive(sent.ranks, inbox.buffers, **inbox.options)
    return exchange.combine_ranks(sent.sums, sent.ranks, axis=inbox.axis, backend="reference")


def _wanted(inbox: Inbox, experts_TK: jax.Array) -> jax.Array:
    """Which ranks have an expert of each token."""
    owner = experts_TK // inbox.experts
    return (
        (owner[:, :, None] == jnp.arange(lax.axis_size(inbox.axis))).any(axis=1).astype(jnp.int32)
    )


def _peers(
    backend: Backend, axis: exchange.Axis, tokens: int, width: int, choices: int, experts: int
) -> Peers | None:
    """The ranks if the kernels take them."""
    if not gemm_backend.takes_kernels(backend):
        return None
    from pallas_kernels import sm90_low_latency_receive as sm90

    peers = exchange.reachable_peers(backend, axis)
    fits = width % SUM_STEP == 0 and choices <= MOST_CHOICES and peers is not None
    fits = fits and sm90.fits(peers.count * tokens, width, choices, experts)
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(
            f"d is {width}, k {choices}, T {tokens} and E {experts}: mosaic_gpu takes multiples of "
            f"{SUM_STEP}, {MOST_CHOICES} at most, and what shared memory has room for"
        )
    return peers if fits else None
