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
LEAST = 1  # steps of a part
TOLERATED = 1.05  # how much longer parts may be so that no request is split


class Plan(NamedTuple):
    """Work of every part and what is to be combined.

    starts: int32 [parts + 1, 2], (request, step) at which each part begins.
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
    return Plan(starts, *_splits(starts))


def _starts(steps: jax.Array, parts: int) -> jax.Array:
    b = steps.shape[0]
    ends = jnp.cumsum(steps + OVERHEAD)
    share = jnp.maximum(ceil_div(ends[-1], parts), LEAST)
    cuts = jnp.minimum(jnp.arange(parts + 1, dtype=jnp.int32) * share, ends[-1])
    request = jnp.searchsorted(ends, cuts, side="right").astype(jnp.int32)
    begin = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])[request]
    step = jnp.maximum(cuts - begin - OVERHEAD, 0)
    step = jnp.where(request < b, step, 0)
    cut = jnp.stack([request, step.astype(jnp.int32)], axis=1)
    whole, longest = _whole(steps, parts)
    keep_whole = longest <= TOLERATED * (share + OVERHEAD).astype(jnp.float32)
    return jnp.where(keep_whole, whole, cut)


def _whole(steps: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Starts if every part gets as many whole requests, and the length of the longest part."""
    b = steps.shape[0]
    each = ceil_div(b, parts)
    padded = jnp.pad(steps + OVERHEAD, (0, each * parts - b)).reshape(parts, each)
    request = jnp.minimum(jnp.arange(parts + 1, dtype=jnp.int32) * each, b)
    longest = padded.sum(axis=1).max().astype(jnp.float32)
    return jnp.stack([request, jnp.zeros_like(request)], axis=1), longest


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
