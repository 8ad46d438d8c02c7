"""Experts spread over the devices of a mesh axis: who needs which token, and in which row.

All of it runs inside `jax.shard_map`. Every device learns all devices' choices, so that senders and
receivers work out the same places without another word. A token is sent once to each device that
has one of its experts, and what comes back is one sum from each (DeepEP's dispatch and combine).
Rows lie sorted by the experts of a device, within one by rank and token.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.expert_layout import ExpertLayout, place
from pallas_kernels.quantize import dequantize, quantize_tiles
from pallas_kernels.token_order import Exchange, InTurn, Order

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    from pallas_kernels.gemm_backend import Backend

ROWS_STEP = 128


class Transport(Protocol):
    """Moves tokens between the devices of an axis: S = ranks * T tokens, by rank and number."""

    def send(
        self, x_TD: Float[Array, "T d"], needs_RTR: Bool[Array, "r T r"], axis: str
    ) -> Float[Array, "S d"]:
        """The tokens that this device needs, at their places among all; others are unspecified."""
        ...

    def bring(
        self, parts_SD: Float[Array, "S d"], needs_RTR: Bool[Array, "r T r"], axis: str
    ) -> Float[Array, "T d"]:
        """The sum over all devices that need a token of their parts, in float32, by rank."""
        ...


class Route(NamedTuple):
    way: Any
    """How to find it: for `SpreadBy` whether a device (first axis) sends a token to a device (last
    axis), [ranks, T, ranks]."""
    overflow: Bool[Array, ""] | None
    """Whether any device of the axis has more rows than room; None where that cannot be."""


@dataclass(frozen=True)
class Spread(InTurn):
    """An exchange over an axis whose devices have equally many experts each."""

    axis: str
    ranks: int
    fp8: bool = False
    """Whether tokens in other formats cross in e4m3."""
    room: float | None = None
    """Rows there is room for, in even shares; None for the worst case."""
    hosts: int = 1
    """Among which choices were divided before."""

    @abstractmethod
    def order(self, experts_TK: Int[Array, "T k"], experts: int) -> Order: ...

    def _within_room(self, layout: ExpertLayout, rows: int, way: Any) -> Order:
        slots, sizes, overflow = layout.slots, layout.sizes, None
        if self.room is not None:
            ends = jnp.cumsum(sizes)
            overflow = jax.lax.pmax((ends[-1] > rows).astype(jnp.int32), self.axis) > 0
            slots = jnp.where(slots < rows, slots, -1)
            sizes = jnp.diff(jnp.minimum(ends, rows), prepend=0)
        return Order(_choices(slots, rows), slots, sizes, Route(way, overflow))

    def rows(self, tokens: int, choices: int, experts: int) -> int:
        """How many a device has room for."""
        worst = self.ranks * tokens * min(choices, experts)
        if self.room is None:
            return worst
        asked = math.ceil(self.room * tokens * choices / self.hosts / ROWS_STEP) * ROWS_STEP
        return min(worst, asked)

    def dispatch(
        self, x: Float[Array, "T d"], order: Order, backend: Backend = "auto"
    ) -> Float[Array, "r d"]:
        if self.fp8:
            return dispatch_in_fp8(self, x, order, backend)
        return self._rows(x, order, backend)

    def dispatch_quantized(
        self, q: jax.Array, scale: jax.Array, order: Order, backend: Backend = "auto"
    ) -> tuple[jax.Array, jax.Array]:
        bits = jax.lax.bitcast_convert_type(q, jnp.uint8)  # which every platform moves
        rows = jax.lax.bitcast_convert_type(self._rows(bits, order, backend), q.dtype)
        return rows, self._rows(scale, order, backend)

    def combine(
        self, rows: Float[Array, "r d"], order: Order,
        weights_TK: Float[Array, "T k"] | None = None, backend: Backend = "auto",
    ) -> Float[Array, "T d"]:  # fmt: skip
        weights = self._gathered(weights_TK, order)
        return self._told(self._sums(rows, order, weights, backend), order)

    def _gathered(self, weights_TK: jax.Array | None, order: Order) -> jax.Array | None:
        """All devices' weights, if there are any."""
        if weights_TK is None:
            return None
        weights = jax.lax.all_gather(weights_TK, self.axis, tiled=True)
        overflow = order.route.overflow
        # So that no word of an overflow is still under way where devices wait for sums.
        return weights if overflow is None else jnp.where(overflow, jnp.nan, weights)

    def _told(self, sums: jax.Array, order: Order) -> jax.Array:
        """Sums, or NaN where rows did not find room."""
        overflow = order.route.overflow
        return sums if overflow is None else jnp.where(overflow, jnp.nan, sums)

    def by_row(self, weights_TK: Float[Array, "T k"], order: Order) -> Float[Array, " r"]:
        weights = jax.lax.all_gather(weights_TK, self.axis, tiled=True).reshape(-1)
        used = jnp.arange(len(order.choices)) < order.sizes.sum()
        return jnp.where(used, weights[order.choices], 0)

    def by_choice(self, of_rows: Float[Array, " r"], order: Order) -> Float[Array, "T k"]:
        found = jnp.where(order.slots >= 0, of_rows[jnp.maximum(order.slots, 0)], 0)
        return jax.lax.psum_scatter(found, self.axis, tiled=True)

    @abstractmethod
    def _rows(self, x: jax.Array, order: Order, backend: Backend) -> jax.Array:
        """Tokens x [T, d] of any dtype in their rows."""

    @abstractmethod
    def _sums(
        self, rows: jax.Array, order: Order, weights_SK: jax.Array | None, backend: Backend
    ) -> jax.Array:
        """Of every token of this device the sum of its rows, times the weights of all tokens."""


@dataclass(frozen=True)
class SpreadBy(Spread):
    """By a transport, and plain jnp on both sides of it."""

    transport: Transport = field(kw_only=True)

    def order(self, experts_TK: Int[Array, "T k"], experts: int) -> Order:
        t, k = experts_TK.shape
        all_SK = jax.lax.all_gather(experts_TK, self.axis, tiled=True)
        layout = place(all_SK, jax.lax.axis_index(self.axis) * experts, experts)
        owner = jnp.where(all_SK >= 0, all_SK // experts, -1).reshape(self.ranks, t, k, 1)
        needs = (owner == jnp.arange(self.ranks)).any(axis=2)
        return self._within_room(layout, self.rows(t, k, experts), needs)

    def _rows(self, x: jax.Array, order: Order, backend: Backend) -> jax.Array:
        found = self.transport.send(x, order.route.way, self.axis)
        return found[order.tokens]

    def _sums(
        self, rows: jax.Array, order: Order, weights_SK: jax.Array | None, backend: Backend
    ) -> jax.Array:
        parts = partial_sums(rows, order.slots, weights_SK)
        return self.transport.bring(parts, order.route.way, self.axis)


def dispatch_in_fp8(exchange: Exchange, x: jax.Array, order: Order, backend: Backend) -> jax.Array:
    """Tokens that cross as V3's do: in e4m3, a power of two for 1 x 128 (report, 3.3.3)."""
    cast = quantize_tiles(x, power_of_two=True, backend=backend)
    return dequantize(*exchange.dispatch_quantized(*cast, order, backend), x.dtype)


def partial_sums(
    rows: Float[Array, "r d"], slots_SK: Int[Array, "S k"], weights_SK: jax.Array | None
) -> Float[Array, "S d"]:
    """Of every token the (weighted) sum of the rows that it has here, in float32, rounded once."""
    total = jnp.zeros((len(slots_SK), rows.shape[1]), jnp.float32)
    for j, slots in enumerate(slots_SK.T):
        part = rows[jnp.maximum(slots, 0)].astype(jnp.float32)
        part = part if weights_SK is None else part * weights_SK[:, j, None]
        total += jnp.where(slots[:, None] >= 0, part, 0)
    return total.astype(rows.dtype)


def _choices(slots_SK: Int[Array, "S k"], rows: int) -> Int[Array, " r"]:
    """Of each row the number of the choice that it is for, 0 for rows of nobody."""
    flat = slots_SK.reshape(-1)
    to = jnp.where(flat < 0, rows + jnp.arange(len(flat)), flat)
    numbers = jnp.arange(len(flat), dtype=jnp.int32)
    return jnp.zeros(rows, jnp.int32).at[to].set(numbers, mode="drop", unique_indices=True)
