"""The timed calls of a decoding step's exchange, on an inbox that is opened before the loop.

Dispatch and combine must take turns on it, so that neither can be timed by itself: a dispatch has
an empty combine behind it, in which nothing crosses but the counters, and a combine an empty
dispatch before it, which brings experts and weights and no token. Both times therefore are upper
bounds, by two kernels with next to nothing to do. Experts are taken to have given normal rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.bench.exchange_loops import AXIS
from dsjax.bench.exchange_shapes import Shape
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.low_latency import (
    Inbox,
    Received,
    combine_receive,
    combine_send,
    dispatch_receive,
    dispatch_send,
    open_inbox,
)


class State(NamedTuple):
    """What a program makes once."""

    inbox: Inbox
    y: jax.Array
    """[E, S, d] results of experts."""
    nobody: jax.Array
    """[T, k] choices of none."""
    empty: Received
    """What an empty dispatch brings, its rows aside."""
    known: Received
    """What the dispatch brings."""


def opened(
    shape: Shape, backend: Backend, x: jax.Array, chosen: jax.Array, weights: jax.Array
) -> State:
    sizes = shape.tokens, shape.dim, shape.top_k, shape.local
    key = jax.random.fold_in(jax.random.key(2), lax.axis_index(AXIS))
    rows = shape.local, shape.ranks * shape.tokens, shape.dim
    nobody = jnp.full_like(chosen, -1)
    plain = open_inbox(*sizes, axis=AXIS, backend="reference")
    empty, known = (
        dispatch_receive(plain, dispatch_send(plain, x, choices, weights))
        for choices in (nobody, chosen)
    )
    inbox = open_inbox(*sizes, axis=AXIS, ctas=shape.ctas or None, backend=backend)
    y = jax.random.normal(key, rows, jnp.bfloat16)
    return State(inbox, y, *lax.optimization_barrier((nobody, empty, known)))


def dispatch(state: State, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> Any:
    got = _there(state, x, chosen, weights)
    return *_listed(got), _home(state, state.empty)


def combine(state: State, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> Any:
    got = _there(state, x, state.nobody, weights)
    return _home(state, state.known), got.counts


def whole(state: State, x: jax.Array, chosen: jax.Array, weights: jax.Array) -> Any:
    got = _there(state, x, chosen, weights)
    return _home(state, got), *_listed(got)


def _there(state: State, *operands: jax.Array) -> Received:
    return dispatch_receive(state.inbox, dispatch_send(state.inbox, *operands))


def _home(state: State, got: Received) -> jax.Array:
    return combine_receive(state.inbox, combine_send(state.inbox, state.y, got))


def _listed(got: Received) -> tuple[jax.Array, ...]:
    rows = (x.reshape(-1, x.shape[-1]) for x in (got.q, got.scale))
    return *rows, got.counts, got.slots, got.weights
