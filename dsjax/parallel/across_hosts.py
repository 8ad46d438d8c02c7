"""Experts spread over hosts and over each host's devices: a token crosses to a host once.

The devices that have the same number on their hosts exchange tokens first, then those of a host
(DeepEP's RDMA and NVLink forwarding). With as many expert groups as hosts, routing limited to M
groups sends a token to M hosts at most (DeepSeek-V3 report, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.parallel.exchange import Spread, Transport, dispatch_in_fp8
from pallas_kernels.token_order import InTurn

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    from pallas_kernels.gemm_backend import Backend
    from pallas_kernels.token_order import Order


class HostRoute(NamedTuple):
    inner: Any
    """The route on this host."""
    needs_HTH: Bool[Array, "hosts T hosts"]
    """Whether a device's token (first axis its host) has an expert on a host (last axis)."""


@dataclass(frozen=True)
class AcrossHosts(InTurn):
    """An exchange over hosts by `transport`, and on each of them by `inner`."""

    axis: str
    hosts: int
    transport: Transport
    inner: Spread
    fp8: bool = False

    def order(self, experts_TK: Int[Array, "T k"], experts: int) -> Order:
        every = jax.lax.all_gather(experts_TK, self.axis)
        on_host = experts * self.inner.ranks
        owner = jnp.where(every >= 0, every // on_host, -1)
        mine = jax.lax.axis_index(self.axis)
        here = jnp.where(owner == mine, every - mine * on_host, -1)
        order = self.inner.order(here.reshape(-1, here.shape[-1]), experts)
        needs = (owner[..., None] == jnp.arange(self.hosts)).any(axis=2)
        return order._replace(route=HostRoute(order.route, needs))

    def dispatch(
        self, x: Float[Array, "T d"], order: Order, backend: Backend = "auto"
    ) -> Float[Array, "r d"]:
        if self.fp8:
            return dispatch_in_fp8(self, x, order, backend)
        return self.inner.dispatch(self._send(x, order), _on_host(order), backend)

    def dispatch_quantized(
        self, q: jax.Array, scale: jax.Array, order: Order, backend: Backend = "auto"
    ) -> tuple[jax.Array, jax.Array]:
        bits = self._send(jax.lax.bitcast_convert_type(q, jnp.uint8), order)
        found = jax.lax.bitcast_convert_type(bits, q.dtype), self._send(scale, order)
        return self.inner.dispatch_quantized(*found, _on_host(order), backend)

    def combine(
        self, rows: Float[Array, "r d"], order: Order,
        weights_TK: Float[Array, "T k"] | None = None, backend: Backend = "auto",
    ) -> Float[Array, "T d"]:  # fmt: skip
        weights = None
        if weights_TK is not None:
            weights = jax.lax.all_gather(weights_TK, self.axis, tiled=True)
        parts = self.inner.combine(rows, _on_host(order), weights, backend)
        return self.transport.bring(parts, order.route.needs_HTH, self.axis)

    def by_row(self, weights_TK: Float[Array, "T k"], order: Order) -> Float[Array, " r"]:
        weights = jax.lax.all_gather(weights_TK, self.axis, tiled=True)
        return self.inner.by_row(weights, _on_host(order))

    def by_choice(self, of_rows: Float[Array, " r"], order: Order) -> Float[Array, "T k"]:
        found = self.inner.by_choice(of_rows, _on_host(order))
        return jax.lax.psum_scatter(found, self.axis, tiled=True)

    def _send(self, x: jax.Array, order: Order) -> jax.Array:
        return self.transport.send(x, order.route.needs_HTH, self.axis)


def _on_host(order: Order) -> Order:
    return order._replace(route=order.route.inner)
