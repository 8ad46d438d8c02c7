"""Tokens and the rows that their experts work on: the contract of an expert exchange.

Every token has a row for each of its k experts; a device's rows lie sorted by its own experts. On
one device `HERE` moves them. Where experts are spread over devices, an exchange for the mesh takes
its place: `dispatch` then sends tokens to the devices of their experts and `combine` brings the
sums home, each being the other's transpose (DeepEP's two calls).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.gemm_backend import Backend
from pallas_kernels.permute import combine_rows, spread_quantized, spread_rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32, Int32

    from pallas_kernels.fp8_products import Product

    Pair = tuple[jax.Array, jax.Array]


class Order(NamedTuple):
    """Token copies sorted by expert."""

    choices: Int32[Array, " r"]
    """Of each row the token, times k, plus which of its k choices it is."""
    slots: Int32[Array, "T k"]
    """The row of each choice, -1 where it is another device's."""
    sizes: Int32[Array, " e"]
    """Rows of each expert; there may be more rows, that are nobody's and hold anything."""
    route: Any = None
    """What else an exchange needs to find the way."""

    @property
    def tokens(self) -> Int32[Array, " r"]:
        return self.choices // self.slots.shape[1]


def sort_by_expert(experts_TK: Int32[Array, "T k"], experts: int) -> Order:
    """Rows of equal experts side by side, in the tokens' order."""
    flat = experts_TK.reshape(-1).astype(jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    slots = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
    sizes = jnp.bincount(flat, length=experts).astype(jnp.int32)
    return Order(order, slots.reshape(experts_TK.shape), sizes)


class Exchange(Protocol):
    """Between tokens on their devices and rows on those of their experts.

    Linear maps of arrays, to be used in the rules of a jax.custom_vjp; `backend` is that of
    `permute`. Implementations are hashable.
    """

    def order(self, experts_TK: Int32[Array, "T k"], experts: int) -> Order:
        """`experts` is the number on this device; experts_TK counts those of all."""
        ...

    def dispatch(
        self, x: Float[Array, "T d"], order: Order, backend: Backend = "auto"
    ) -> Float[Array, "r d"]:
        """Every token in each of its rows."""
        ...

    def dispatch_quantized(
        self, q: jax.Array, scale: jax.Array, order: Order, backend: Backend = "auto"
    ) -> Pair:
        """The same for e4m3 and its scales for 1 x 128."""
        ...

    def combine(
        self, rows: Float[Array, "r d"], order: Order,
        weights_TK: Float32[Array, "T k"] | None = None, backend: Backend = "auto",
    ) -> Float[Array, "T d"]:  # fmt: skip
        """The sum of each token's rows, times weights if given."""
        ...

    def dispatch_beside(
        self, product: Product, q: jax.Array, scale: jax.Array, order: Order,
        backend: Backend = "auto",
    ) -> tuple[jax.Array, Pair]:  # fmt: skip
        """A product that needs none of it, and `dispatch_quantized`; at the same time, maybe."""
        ...

    def combine_beside(
        self, product: Product, rows: Float[Array, "r d"], order: Order,
        weights_TK: Float32[Array, "T k"] | None = None, backend: Backend = "auto",
    ) -> tuple[jax.Array, Float[Array, "T d"]]:  # fmt: skip
        """A product that needs none of it, and `combine`; at the same time, maybe."""
        ...

    def by_row(self, weights_TK: Float32[Array, "T k"], order: Order) -> Float32[Array, " r"]:
        """Of each row its choice's weight."""
        ...

    def by_choice(self, of_rows: Float32[Array, " r"], order: Order) -> Float32[Array, "T k"]:
        """Of each choice what its row has: the transpose of `by_row`."""
        ...


class InTurn(ABC):
    """An exchange beside which nothing is computed."""

    @abstractmethod
    def dispatch_quantized(
        self, q: jax.Array, scale: jax.Array, order: Order, backend: Backend = "auto"
    ) -> Pair: ...

    @abstractmethod
    def combine(
        self, rows: jax.Array, order: Order, weights_TK: jax.Array | None = None,
        backend: Backend = "auto",
    ) -> jax.Array: ...  # fmt: skip

    def dispatch_beside(
        self, product: Product, q: jax.Array, scale: jax.Array, order: Order,
        backend: Backend = "auto",
    ) -> tuple[jax.Array, Pair]:  # fmt: skip
        return product.alone(backend), self.dispatch_quantized(q, scale, order, backend)

    def combine_beside(
        self, product: Product, rows: jax.Array, order: Order,
        weights_TK: jax.Array | None = None, backend: Backend = "auto",
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        return product.alone(backend), self.combine(rows, order, weights_TK, backend)


@dataclasses.dataclass(frozen=True)
class Here(InTurn):
    """All experts and all tokens on one device."""

    def order(self, experts_TK: jax.Array, experts: int) -> Order:
        return sort_by_expert(experts_TK, experts)

    def dispatch(self, x: jax.Array, order: Order, backend: Backend = "auto") -> jax.Array:
        return spread_rows(x, order.slots, backend=backend)

    def dispatch_quantized(
        self, q: jax.Array, scale: jax.Array, order: Order, backend: Backend = "auto"
    ) -> Pair:
        return spread_quantized(q, scale, order.slots, backend=backend)

    def combine(
        self, rows: jax.Array, order: Order, weights_TK: jax.Array | None = None,
        backend: Backend = "auto",
    ) -> jax.Array:  # fmt: skip
        return combine_rows(rows, order.slots, weights_TK, backend=backend)

    def by_row(self, weights_TK: jax.Array, order: Order) -> jax.Array:
        return weights_TK.reshape(-1)[order.choices]

    def by_choice(self, of_rows: jax.Array, order: Order) -> jax.Array:
        return of_rows[order.slots]


HERE = Here()
