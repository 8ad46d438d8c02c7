"""Tokens of all ranks into the rows of this rank's experts, on Hopper over NVLink.

The rank that wants rows pulls them: a persistent CTA of one warpgroup fetches a token's row from
its rank with one bulk copy into a ring of shared memory and stores it from there to all of its
slots. So a row crosses the link once, whatever number of experts here want it, and comes to lie in
expert order, as grouped products read it, without a second pass. The tokens are divided evenly by
their number on the device. It takes few CTAs, so that the other SMs of the GPU stay free.

Scales travel beside their row as a row of their own: written K-block-major, word by word, they
take longer than the rows themselves (four ranks on one H200: 820 us against 386 as rows).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import Ranks
from pallas_kernels.sm90_traffic import Traffic, alone

SCALE_STEP = 4  # scales in the 16 bytes that bulk copies move
CTAS = 64
AHEAD = 2  # steps: reading slots takes longer than moving a short row
MOST_BARRIERS = 32  # that an array of them holds
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
Refs = types.SimpleNamespace
Scalar = Any


class Ring(NamedTuple):
    """Shared memory of a CTA's rows in bytes, and how many rows at most.

    `walkers`: warpgroups that have as many rows each, of tokens of their own. One thread of each
    starts all copies, and of short rows it does not start as many as an SM moves.
    """

    bytes: int = 192 << 10
    stages: int = 12
    walkers: int = 3

    def fitting(self, row: int) -> tuple[int, int]:
        """Walkers for rows of so many bytes, and stages of each, 2 at least."""
        walkers = max(1, min(self.walkers, self.bytes // (2 * row)))
        most = min(self.stages, MOST_BARRIERS // walkers)
        return walkers, max(2, min(most, self.bytes // (row * walkers)))


RING = Ring()


@lowered_once
def dispatch(
    x: jax.Array, slots: jax.Array, tokens: jax.Array, count: jax.Array, *, rows: int,
    peers: Ranks, ctas: int = CTAS, ring: Ring = RING, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out [rows, w] with out[slots[s * T + t, j]] = x [T, w] of rank s, row t.

    For the tokens s * T + t among the first count[0] of `tokens`; slots outside of [0, rows) are
    left out, and rows that none names unwritten. A row of x is a multiple of 16 bytes.
    """
    return _pull(
        "dispatch_rows", x, None, slots, tokens, count, rows, peers, ctas, ring, interpret
    )[0]


@lowered_once
def dispatch_quantized(
    q: jax.Array, scale: jax.Array, slots: jax.Array, tokens: jax.Array, count: jax.Array, *,
    rows: int, peers: Ranks, ctas: int = CTAS, ring: Ring = RING, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`dispatch` of e4m3 q [T, d] and of its float32 scale [T, tiles]."""
    tiles = scale.shape[-1]
    q, scale = _pull(
        "dispatch_quantized", q, scale, slots, tokens, count, rows, peers, ctas, ring, interpret
    )  # fmt: skip
    return q, scale[..., :tiles]


def _pull(
    name: str, x: jax.Array, scale: jax.Array | None, slots: jax.Array, tokens: jax.Array,
    count: jax.Array, rows: int, peers: Ranks, ctas: int, ring: Ring, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    moved = traffic(name, x, scale, slots, tokens, count, rows, peers, ctas, ring)
    return alone(moved, interpret)


def traffic(
    name: str, x: jax.Array, scale: jax.Array | None, slots: jax.Array, tokens: jax.Array,
    count: jax.Array, rows: int, peers: Ranks, ctas: int, ring: Ring = RING,
) -> Traffic:  # fmt: skip
    """`dispatch`, or `dispatch_quantized` with columns of scales up to a multiple of 4."""
    width = x.shape[-1]
    walkers, stages = ring.fitting(width * x.dtype.itemsize)
    operands = dict(x=x, slots=slots, tokens=tokens, count=count)
    out = dict(out=jax.ShapeDtypeStruct((*peers.stacked, rows, width), x.dtype))
    memory = dict(x_s=plgpu.SMEM((walkers, stages, width), x.dtype))
    if scale is not None:
        scale = operands["scale"] = _padded(scale)
        shape = (*peers.stacked, rows, scale.shape[-1])
        out["scale_out"] = jax.ShapeDtypeStruct(shape, scale.dtype)
        memory["scale_s"] = plgpu.SMEM((walkers, stages, scale.shape[-1]), scale.dtype)

    def run(peers: Ranks, refs: Sequence[Any], *, done: Any = None, **memory: Any) -> None:
        named = dict(zip((*operands, *out), refs, strict=True))
        walker = lax.axis_index("wg") if walkers > 1 else 0
        _walk(Refs(**named, **memory), peers, walker)
        peers.finish(done, walkers)

    full = plgpu.Barrier(num_arrivals=1 + (scale is not None), num_barriers=walkers * stages)
    return Traffic(
        name, peers, min(ctas, slots.shape[-2]), list(operands.values()), list(out.values()),
        memory, dict(full=full, **peers.semaphores()), run, threads=walkers,
    )  # fmt: skip


def _padded(scale: jax.Array) -> jax.Array:
    """With columns up to a multiple of what a bulk copy moves."""
    more = -scale.shape[-1] % SCALE_STEP
    return jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, more)]) if more else scale


def _walk(refs: Refs, peers: Ranks, walker: Scalar) -> None:
    """Fetches this walker's share of the tokens, half a ring ahead of what it stores."""
    slots, tokens = peers.own(refs.slots), peers.own(refs.tokens)
    total, choices = slots.shape
    walkers, stages, _ = refs.x_s.shape
    ahead = stages // 2
    first, own = _share(peers, walker, walkers, lax.clamp(0, peers.own(refs.count)[0], total))

    def token(i: Scalar) -> Scalar:
        listed = tokens[lax.min(first + i, jnp.int32(total - 1))]
        return lax.clamp(jnp.int32(0), listed, jnp.int32(total - 1))

    def targets(token: Scalar) -> tuple[Scalar, ...]:
        return tuple(slots[token, j] for j in range(choices))

    def place(i: Scalar) -> Place:
        stage = lax.rem(i, jnp.int32(stages))
        scale = refs.scale_s.at[walker, stage] if hasattr(refs, "scale_s") else None
        return Place(refs.x_s.at[walker, stage], scale, refs.full.at[walker * stages + stage])

    def fetch(i: Scalar, token: Scalar) -> None:
        start = functools.partial(_fetch, refs, peers, place(i), token)
        pl.when(i < own)(start)

    def step(i: Scalar, carry: Any) -> Any:
        # Slots of tokens i, i + 1 and so on, the tokens behind these, those to fetch now and later.
        [now, *slots_ahead], [upcoming, *tokens_ahead], [distant, *fetch_ahead] = carry
        plgpu.barrier_wait(place(i).full)
        _store(refs, peers, place(i), now)
        plgpu.wait_smem_to_gmem(stages - ahead, wait_read_only=True)
        fetch(i + ahead, distant)
        asked = targets(upcoming), token(i + 2 * AHEAD), token(i + AHEAD + ahead)
        found, one, other = lax.optimization_barrier(asked)
        return [*slots_ahead, found], [*tokens_ahead, one], [*fetch_ahead, other]

    def tokens_from(first: int) -> list[Scalar]:
        return [token(jnp.int32(first + n)) for n in range(AHEAD)]

    for i in range(ahead):
        fetch(jnp.int32(i), token(jnp.int32(i)))
    start = [targets(found) for found in tokens_from(0)], tokens_from(AHEAD), tokens_from(ahead)
    lax.fori_loop(jnp.int32(0), own, step, start)
    plgpu.wait_smem_to_gmem(0)


class Place(NamedTuple):
    """A stage of the ring, and what tells that it is full."""

    row: Any
    scale: Any
    full: Any


def _share(peers: Ranks, walker: Scalar, walkers: int, total: Scalar) -> tuple[Scalar, Scalar]:
    """The first of this walker's share of `total`, and how many it has."""
    number, parts = peers.cta() * walkers + walker, jnp.int32(peers.ctas() * walkers)
    each, over = lax.div(total, parts), lax.rem(total, parts)
    return number * each + lax.min(number, over), each + (number < over).astype(jnp.int32)


def _fetch(refs: Refs, peers: Ranks, place: Place, token: Scalar) -> None:
    height = jnp.int32(peers.own(refs.x).shape[0])
    rank, row = lax.div(token, height), lax.rem(token, height)
    copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=place.full, oob_mode=INSIDE)
    copy(peers.of(refs.x, rank).at[row], place.row)
    if place.scale is not None:
        copy(peers.of(refs.scale, rank).at[row], place.scale)


def _store(refs: Refs, peers: Ranks, place: Place, slots: Sequence[Scalar]) -> None:
    out = peers.own(refs.out)
    named = [(slot >= 0) & (slot < out.shape[0]) for slot in slots]
    pairs = [(place.row, out)]
    if place.scale is not None:
        pairs.append((place.scale, peers.own(refs.scale_out)))
    for slot, inside in zip(slots, named, strict=True):
        pl.when(inside)(functools.partial(_store_all, pairs, slot))
    # An empty group is complete at once and would be counted in place of an older one.
    some = functools.reduce(jnp.logical_or, named)
    pl.when(some)(plgpu.commit_smem_to_gmem_group)
    pl.when(jnp.logical_not(some))(functools.partial(plgpu.wait_smem_to_gmem, 0))


def _store_all(pairs: Sequence[tuple[Any, Any]], slot: Scalar) -> None:
    for row, out in pairs:
        plgpu.copy_smem_to_gmem(row, out.at[slot], commit_group=False)
