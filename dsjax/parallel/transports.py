"""Transports on XLA's collectives: dense, which runs anywhere, and ragged, which GPUs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Dense:
    """all_to_all of T rows between any two devices, those that are needed first.

    T is what the worst case takes: every token has an expert there.
    """

    def send(
        self, x_TD: Float[Array, "T d"], needs_RTR: Bool[Array, "r T r"], axis: str
    ) -> Float[Array, "S d"]:
        me = jax.lax.axis_index(axis)
        sent = x_TD[_needed_first(needs_RTR[me].T)]
        found = jax.lax.all_to_all(sent, axis, 0, 0)
        return _take(found, _places(needs_RTR[:, :, me])).reshape(-1, x_TD.shape[1])

    def bring(
        self, parts_SD: Float[Array, "S d"], needs_RTR: Bool[Array, "r T r"], axis: str
    ) -> Float[Array, "T d"]:
        me, ranks = jax.lax.axis_index(axis), len(needs_RTR)
        parts = parts_SD.reshape(ranks, -1, parts_SD.shape[1])
        sent = _take(parts, _needed_first(needs_RTR[:, :, me]))
        found = jax.lax.all_to_all(sent, axis, 0, 0)
        return _by_rank(_take(found, _places(needs_RTR[me].T)), needs_RTR[me].T)


@dataclass(frozen=True)
class Ragged:
    """`jax.lax.ragged_all_to_all` of the rows that are needed; XLA compiles it for GPUs only."""

    def send(
        self, x_TD: Float[Array, "T d"], needs_RTR: Bool[Array, "r T r"], axis: str
    ) -> Float[Array, "S d"]:
        me, ranks = jax.lax.axis_index(axis), len(needs_RTR)
        order = jnp.argsort(~needs_RTR[me].T.reshape(-1), stable=True) % len(x_TD)
        found = _exchange(x_TD[order], needs_RTR.sum(axis=1), ranks * len(x_TD), axis)
        return found[_compact(needs_RTR[:, :, me]).reshape(-1)]

    def bring(
        self, parts_SD: Float[Array, "S d"], needs_RTR: Bool[Array, "r T r"], axis: str
    ) -> Float[Array, "T d"]:
        me = jax.lax.axis_index(axis)
        order = jnp.argsort(~needs_RTR[:, :, me].reshape(-1), stable=True)
        counts = needs_RTR.sum(axis=1).T
        found = _exchange(parts_SD[order], counts, len(parts_SD), axis)
        return _by_rank(found[_compact(needs_RTR[me].T)], needs_RTR[me].T)


def _needed_first(needs_RT: Bool[Array, "r T"]) -> Int[Array, "r T"]:
    return jnp.argsort(~needs_RT, axis=1, stable=True)


def _places(needs_RT: Bool[Array, "r T"]) -> Int[Array, "r T"]:
    """Of each token its number among those needed of its rank."""
    return jnp.maximum(jnp.cumsum(needs_RT, axis=1) - 1, 0)


def _compact(needs_RT: Bool[Array, "r T"]) -> Int[Array, "r T"]:
    """The same among those of all ranks."""
    return jnp.maximum(jnp.cumsum(needs_RT.reshape(-1)) - 1, 0).reshape(needs_RT.shape)


def _take(x_RTD: jax.Array, places_RT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_RTD, places_RT[:, :, None], axis=1)


def _by_rank(parts_RTD: jax.Array, needs_RT: jax.Array) -> jax.Array:
    total = jnp.zeros(parts_RTD.shape[1:], jnp.float32)
    for part, needed in zip(parts_RTD, needs_RT, strict=True):
        total += jnp.where(needed[:, None], part.astype(jnp.float32), 0)
    return total.astype(parts_RTD.dtype)


def _exchange(sent: jax.Array, counts_RR: jax.Array, rows: int, axis: str) -> jax.Array:
    """Rows sorted by receiver become rows sorted by sender; counts are [sender, receiver]."""
    me, counts = jax.lax.axis_index(axis), counts_RR.astype(jnp.int32)
    before = jnp.cumsum(counts, axis=0) - counts  # at a receiver, of lower senders
    own = counts[me]
    return jax.lax.ragged_all_to_all(
        sent, jnp.zeros((rows, sent.shape[1]), sent.dtype),
        jnp.cumsum(own) - own, own, before[me], counts[:, me], axis_name=axis,
    )  # fmt: skip
