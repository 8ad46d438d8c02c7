"""How paged decode is dealt out: every SM part gets an equally long piece of one long row of work.

The requests lie behind one another, each as long as its steps of 128 tokens and a fixed overhead.
Part p begins where the row has been cut for the p-th time, and ends where p + 1 begins; a request
that a cut goes through is split, and its pieces are summed up afterwards. All of it is computed by
the device from `lengths`, so that nothing returns to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import ceil_div

STEP = 128  # tokens: two pages
OVERHEAD = 2  # steps that beginning and ending a request costs
TOLERATED = 1.05  # how much longer parts may be if fewer requests are split


class Plan(NamedTuple):
    """Work of every part and what is to be combined.

    starts: int32 [parts + 1, 3], (request, step) at which each part begins, and the request's
    length, of which a part then need not wait to learn.
    splits: int32 [parts, 3], (request, first part, last part) of split requests.
    count: int32 [1], how many of `splits` there are.
    """

    starts: jax.Array
    splits: jax.Array
    count: jax.Array

    @property
    def parts(self) -> int:
        return self.splits.shape[0]


def steps_of(lengths: jax.Array) -> jax.Array:
    """A request without tokens takes one step too: its output has to be written."""
    return jnp.maximum(ceil_div(lengths, STEP), 1)


def plan(lengths: jax.Array, parts: int) -> Plan:
    """Of int32 [b] lengths, for so many parts."""
    steps = steps_of(lengths)
    starts = _starts(steps, parts)
    length = lengths[jnp.minimum(starts[:, :1], lengths.shape[0] - 1)]
    return Plan(jnp.concatenate([starts, length], axis=1), *_splits(starts))


def _starts(steps: jax.Array, parts: int) -> jax.Array:
    """Of three ways to deal the one with the shortest longest part, the first of near equals."""
    ways = (_whole(steps, parts), _apart(steps, parts), _row(steps, parts))
    longest = jnp.stack([each for _, each in ways]).astype(jnp.float32)
    best = jnp.argmax(longest <= TOLERATED * longest.min())
    return jnp.stack([starts for starts, _ in ways])[best]


def _whole(steps: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Starts if every part gets as many whole requests, and the length of the longest part."""
    b = steps.shape[0]
    each = ceil_div(b, parts)
    padded = jnp.pad(steps + OVERHEAD, (0, each * parts - b)).reshape(parts, each)
    request = jnp.minimum(jnp.arange(parts + 1, dtype=jnp.int32) * each, b)
    return jnp.stack([request, jnp.zeros_like(request)], axis=1), padded.sum(axis=1).max()


def _apart(steps: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """The same if no part gets more than one piece: requests are cut into equal pieces, as many as
    there are parts for if the longest request's pieces are the longest."""
    b = steps.shape[0]
    if b > parts:
        return jnp.zeros((parts + 1, 2), jnp.int32), jnp.int32(jnp.iinfo(jnp.int32).max)
    most = -(-steps.max() // jnp.arange(1, parts + 1, dtype=jnp.int32))
    enough = -(-steps[None] // most[:, None]).sum(axis=1) <= parts
    high = jnp.where(enough, most, steps.max()).min()
    length = -(-steps // -(-steps // high))
    pieces = -(-steps // length)
    ends = jnp.cumsum(pieces)
    part = jnp.arange(parts + 1, dtype=jnp.int32)
    request = jnp.searchsorted(ends, part, side="right").astype(jnp.int32)
    at = jnp.minimum(request, b - 1)
    step = (part - (ends - pieces)[at]) * length[at]
    step = jnp.where(request < b, step, 0).astype(jnp.int32)
    return jnp.stack([request, step], axis=1), length.max() + OVERHEAD


def _row(steps: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """The same if the row of all requests is cut into equal parts."""
    b = steps.shape[0]
    ends = jnp.cumsum(steps + OVERHEAD)
    share = ceil_div(ends[-1], parts)
    cuts = jnp.minimum(jnp.arange(parts + 1, dtype=jnp.int32) * share, ends[-1])
    request = jnp.searchsorted(ends, cuts, side="right").astype(jnp.int32)
    begin = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[request]
    step = jnp.maximum(cuts - begin - OVERHEAD, 0)
    step = jnp.where(request < b, step, 0).astype(jnp.int32)
    return jnp.stack([request, step], axis=1), share + OVERHEAD


def _splits(starts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A request is split where a part begins inside it; the first such part ends its list."""
    parts = starts.shape[0] - 1
    request, step = starts[:parts, 0], starts[:parts, 1]
    inside = step > 0
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), jnp.where(inside, request, -1)[:-1]])
    first = inside & (before != request)
    same = inside[None] & (request[None] == request[:, None])
    part = jnp.arange(parts, dtype=jnp.int32)
    last = jnp.max(jnp.where(same, part[None], 0), axis=1)
    rows = jnp.stack([request, part - 1, last], axis=1)
    place = jnp.where(first, jnp.cumsum(first) - 1, parts)
    splits = jnp.zeros((parts, 3), jnp.int32).at[place].set(rows, mode="drop")
    return splits, jnp.sum(first, dtype=jnp.int32)[None]
