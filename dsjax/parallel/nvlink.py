"""The exchange by our own kernels: tokens read over NVLink straight into their experts' rows.

For the Hopper GPUs of one process, each of which can read the others' memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsjax.parallel.exchange import Spread
from pallas_kernels import expert_exchange as kernels
from pallas_kernels import expert_overlap
from pallas_kernels.device import is_hopper
from pallas_kernels.expert_layout import expert_layout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Int32

    from pallas_kernels.fp8_products import Product
    from pallas_kernels.gemm_backend import Backend
    from pallas_kernels.token_order import Order

MOST_RANKS = 8  # of an NVLink domain of Hopper hosts


class Way(NamedTuple):
    tokens: Int32[Array, " S"]
    """Those that have a row here, in order; only the first `count` count."""
    count: Int32[Array, "1"]
    to: Bool[Array, "T r"]
    """The ranks that have a row of this one's tokens."""


@dataclass(frozen=True)
class NvLink(Spread):
    """`Spread` whose ranks read what they need themselves."""

    def order(self, experts_TK: Int[Array, "T k"], experts: int) -> Order:
        layout = expert_layout(experts_TK, experts, axis=self.axis)
        owner = jnp.where(experts_TK >= 0, experts_TK // experts, -1)
        to = (owner[:, :, None] == jnp.arange(self.ranks)).any(axis=1)
        way = Way(layout.tokens, layout.count, to)
        return self._within_room(layout, self.rows(*experts_TK.shape, experts), way)

    def dispatch_quantized(
        self, q: jax.Array, scale: jax.Array, order: Order, backend: Backend = "auto"
    ) -> tuple[jax.Array, jax.Array]:
        return kernels.dispatch_quantized(
            q, scale, *self._way(order), axis=self.axis, rows=len(order.choices), backend=backend
        )

    def dispatch_beside(
        self, product: Product, q: jax.Array, scale: jax.Array, order: Order,
        backend: Backend = "auto",
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
        return expert_overlap.dispatch_beside(
            product, q, scale, *self._way(order), axis=self.axis, rows=len(order.choices),
            backend=backend,
        )  # fmt: skip

    def combine_beside(
        self, product: Product, rows: jax.Array, order: Order,
        weights_TK: jax.Array | None = None, backend: Backend = "auto",
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        known = self._known(order, self._gathered(weights_TK, order))
        result, sums = expert_overlap.combine_beside(
            product, rows, *known, axis=self.axis, backend=backend
        )
        return result, self._told(sums, order)

    def _rows(self, x: jax.Array, order: Order, backend: Backend) -> jax.Array:
        return kernels.dispatch_rows(
            x, *self._way(order), axis=self.axis, rows=len(order.choices), backend=backend
        )

    def _sums(
        self, rows: jax.Array, order: Order, weights_SK: jax.Array | None, backend: Backend
    ) -> jax.Array:
        known = self._known(order, weights_SK)
        return kernels.combine_rows(rows, *known, axis=self.axis, backend=backend)

    def _known(self, order: Order, weights_SK: jax.Array | None) -> tuple:
        """What sums need besides rows."""
        way: Way = order.route.way
        return order.slots, weights_SK, way.tokens, way.count, way.to

    def _way(self, order: Order) -> tuple[jax.Array, jax.Array, jax.Array]:
        return order.slots, order.route.way.tokens, order.route.way.count


def missing_for_nvlink(mesh: Mesh) -> str | None:
    """Why a mesh's `expert` axis cannot have this exchange; None if it can."""
    ranks, devices = mesh.shape["expert"], mesh.devices.reshape(-1)
    if not is_hopper():
        return f"its kernels need Hopper GPUs (H100, H200), and this is {devices[0].device_kind}"
    if jax.process_count() > 1:
        return f"it takes the GPUs of one process, and there are {jax.process_count()} processes"
    if ranks > MOST_RANKS:
        return f"it takes up to {MOST_RANKS} GPUs, and expert is {ranks}"
    if [device.id for device in devices] != sorted(device.id for device in devices):
        return f"it takes devices in order, and the mesh has {[device.id for device in devices]}"
    return None
