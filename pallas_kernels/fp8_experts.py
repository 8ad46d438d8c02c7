"""Routed SwiGLU experts in FP8: tokens sorted by expert, two grouped products, a weighted sum.

Tokens are cast before they are copied to their experts, and so is the gradient of the sum, both
with scales that are powers of two as DeepSeek-V3 dispatches them (report, section 3.3.3). The
gradient meets the routing weights behind the down projection's backward product, where they are a
factor a row: d_h = w * (d_y @ down.T), and its product with h without w is w's own gradient, so the
experts' results need not be kept.

Shared experts see the same casts, and their products are what the GPUs compute while tokens are on
their way: `Exchange.dispatch_beside` and `combine_beside`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks, fp8_gauge
from pallas_kernels.fp8_products import Product, Rows, as_master
from pallas_kernels.fp8_recipe import Pair, turned
from pallas_kernels.fp8_weight import Fp8Weight
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.kept import as_bits, from_bits, kept
from pallas_kernels.quantize import FLOATS, quantize_tiles, swiglu_quantize_both
from pallas_kernels.swiglu_backward import swiglu_backward
from pallas_kernels.token_order import HERE, Exchange, Order

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


def fp8_experts(
    x: Float[Array, "T d"],
    experts_TK: Int32[Array, "T k"],
    weights_TK: Float[Array, "T k"],
    gate_up: Fp8Weight,
    down: Fp8Weight,
    shared: tuple[Fp8Weight, Fp8Weight] | None = None,
    *,
    exchange: Exchange = HERE,
    backend: Backend = "auto",
) -> Float[Array, "T d"]:
    """The sum over a token's k experts e of weight * (silu(x @ gate_e) * (x @ up_e)) @ down_e.

    gate_up holds [E, D, 2F] with the gate first, down [E, F, D]; weights are float32, x bfloat16
    or float32, as the result. `shared` experts are a gate_up [D, 2S] and a down [S, D] for all
    tokens: `fp8_mlp` of x is added, but for the cast of its gradient the same. An exchange of
    several devices makes E those of this device alone, while experts_TK count all. Differentiable
    in x, weights_TK and the masters. Raises ValueError where shapes or dtypes do not fit.
    """
    checks.array("x", x, "[T, D]", *FLOATS)
    checks.array("gate_up", gate_up.q, "[E, D, 2F]", checks.E4M3)
    checks.exact("experts_TK", experts_TK, (x.shape[0], experts_TK.shape[-1]), jnp.int32)
    checks.exact("weights_TK", weights_TK, experts_TK.shape)
    e, d, width = gate_up.q.shape
    if d != x.shape[1]:
        raise ValueError(
            f"x is {x.shape} and gate_up {gate_up.q.shape}: expected [T, D], [E, D, 2F]"
        )
    checks.exact("down", down.q, (e, width // 2, d), checks.E4M3)
    if shared is not None:
        shared = Shared(*shared)
        checks.exact(
            "shared gate_up", shared.gate_up.q, (d, 2 * shared.down.q.shape[0]), checks.E4M3
        )
        checks.exact("shared down", shared.down.q, (shared.down.q.shape[0], d), checks.E4M3)
    return _experts(exchange, backend, x, experts_TK, weights_TK, gate_up, down, shared)


class Shared(NamedTuple):
    """An MLP for all tokens."""

    gate_up: Fp8Weight
    down: Fp8Weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(exchange: Exchange, backend: Backend, *operands) -> jax.Array:
    return _forward(exchange, backend, *operands)[0]


def _forward(
    exchange: Exchange, backend: Backend, x: jax.Array, experts_TK: jax.Array,
    weights_TK: jax.Array, gate_up: Fp8Weight, down: Fp8Weight, shared: Shared | None,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    moving, one = Moving(exchange, backend), Rows(None, x.dtype, backend)
    with jax.named_scope("dispatch"):
        order = kept(exchange.order(experts_TK, gate_up.q.shape[0]))
        x_q = quantize_tiles(x, power_of_two=True, backend=backend)
        product = shared and one.forward_product(x_q, shared.gate_up)
        s_inner, copies = moving.dispatch(product, x_q, order)
    rows = Rows(order.sizes, x.dtype, backend)
    with jax.named_scope("routed_experts"):
        inner = rows.forward(copies, gate_up)
        h, cache = swiglu_quantize_both(inner, _used(order, experts_TK.size), backend=backend)
        results = rows.forward(h, down)
    with jax.named_scope("shared_experts"):
        s_h: Any = None
        s_cache = None
        if shared:
            s_h, s_cache = swiglu_quantize_both(s_inner, backend=backend)
    with jax.named_scope("combine"):
        product = shared and one.forward_product(s_h, shared.down)
        s_out, out = moving.combine(product, results, order, weights_TK)
    x_q, caches, *weights = as_bits((x_q, (cache, s_cache), gate_up, down, shared))
    return _sum(out, s_out), (x_q, kept(caches), order, weights_TK, *weights)


def _used(order: Order, choices: int) -> jax.Array | None:
    """How many rows are somebody's, where there are more than this device's tokens have choices."""
    if len(order.choices) <= choices:
        return None
    return order.sizes.sum(dtype=jnp.int32, keepdims=True)


def _backward(exchange: Exchange, backend: Backend, saved: tuple, grad: jax.Array) -> tuple:
    x_q, (cache, s_cache), order, weights_TK, gate_up, down, shared = from_bits(saved)
    moving, one = Moving(exchange, backend), Rows(None, grad.dtype, backend)
    rows = Rows(order.sizes, grad.dtype, backend)
    with jax.named_scope("combine"):
        grad_q, grad_t = _cast(grad, down, shared, backend)
        product = shared and one.backward_product(grad_q, shared.down)
        s_d_h, grads = moving.dispatch(product, grad_q, order)
        weights = exchange.by_row(weights_TK, order)
    with jax.named_scope("routed_experts"):
        d_h = rows.backward(grads, down)
        inner = swiglu_backward(
            *cache, d_h, weights, order.sizes, recipe=down.recipe, backend=backend
        )
        grads_t = turned(grads, order.sizes, backend)
        d_down = rows.weight_gradient(inner.h_t, grads_t, down)
    with jax.named_scope("shared_experts"):
        s_inner = shared and swiglu_backward(*s_cache, s_d_h, recipe=down.recipe, backend=backend)
        s_d_down = shared and one.weight_gradient(s_inner.h_t, grad_t, shared.down)
        x_t = shared and turned(x_q, None, backend)
    with jax.named_scope("dispatch"):
        product = shared and one.backward_product(s_inner.grad, shared.gate_up)
        s_d_x, copies = moving.dispatch(product, x_q, order)
    with jax.named_scope("routed_experts"):
        copies_t = turned(copies, order.sizes, backend)
        d_gate_up = rows.weight_gradient(copies_t, inner.grad_t, gate_up)
        d_copies = rows.backward(inner.grad, gate_up)
    with jax.named_scope("dispatch"):
        product = shared and one.weight_gradient_product(x_t, s_inner.grad_t, shared.gate_up)
        s_d_gate_up, d_x = moving.combine(product, d_copies, order, None)
    no_gradient = np.zeros(weights_TK.shape, jax.dtypes.float0)
    counts = fp8_gauge.read(x_q, grad_q)
    d_weights = inner.d_weights
    if d_weights is not None:
        d_weights = exchange.by_choice(d_weights, order)
    d_shared = shared and Shared(
        shared.gate_up.cotangent(as_master(s_d_gate_up, shared.gate_up), counts),
        shared.down.cotangent(s_d_down, counts),
    )
    return (
        _sum(d_x, s_d_x), no_gradient, d_weights,
        gate_up.cotangent(d_gate_up, counts), down.cotangent(d_down, counts), d_shared,
    )  # fmt: skip


class Moving(NamedTuple):
    """The two ways of an exchange, each beside a product where there is one."""

    exchange: Exchange
    backend: Backend

    def dispatch(self, product: Product | None, rows: Pair, order: Order) -> tuple[Any, Pair]:
        """The product, None where there is none, and the rows in their experts' order."""
        if product is None:
            return None, self.exchange.dispatch_quantized(*rows, order, self.backend)
        return self.exchange.dispatch_beside(product, *rows, order, self.backend)

    def combine(
        self, product: Product | None, rows: jax.Array, order: Order, weights: jax.Array | None
    ) -> tuple[Any, jax.Array]:
        """The product, None where there is none, and the sums."""
        if product is None:
            return None, self.exchange.combine(rows, order, weights, self.backend)
        return self.exchange.combine_beside(product, rows, order, weights, self.backend)


def _cast(
    grad: jax.Array, down: Fp8Weight, shared: Shared | None, backend: Backend
) -> tuple[Pair, Any]:
    """The gradient as it is dispatched and, for a shared weight, its transpose."""
    if shared is None:
        return down.recipe.rows(grad, backend), None
    return down.recipe.both(grad, None, backend, power_of_two=True)


def _sum(routed: jax.Array, shared: jax.Array | None) -> jax.Array:
    return routed if shared is None else routed + shared


_experts.defvjp(_forward, _backward)
