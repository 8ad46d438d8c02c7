"""Routed SwiGLU experts in FP8: tokens sorted by expert, two grouped products, a weighted sum.

Tokens are cast before they are copied to their experts, and so is the gradient of the sum, both
with scales that are powers of two as DeepSeek-V3 dispatches them (report, section 3.3.3). The
gradient meets the routing weights behind the down projection's backward product, where they are a
factor a row: d_h = w * (d_y @ down.T), and its product with h without w is w's own gradient, so the
experts' results need not be kept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks, fp8_gauge
from pallas_kernels.fp8_products import Rows
from pallas_kernels.fp8_recipe import turned
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
    *,
    exchange: Exchange = HERE,
    backend: Backend = "auto",
) -> Float[Array, "T d"]:
    """The sum over a token's k experts e of weight * (silu(x @ gate_e) * (x @ up_e)) @ down_e.

    gate_up holds [E, D, 2F] with the gate first, down [E, F, D]; weights are float32, x bfloat16
    or float32, as the result. An exchange of several devices makes E those of this device alone,
    while experts_TK count all. Differentiable in x, weights_TK and the masters. Raises ValueError
    where shapes or dtypes do not fit.
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
    return _experts(exchange, backend, x, experts_TK, weights_TK, gate_up, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(exchange: Exchange, backend: Backend, *operands) -> jax.Array:
    return _forward(exchange, backend, *operands)[0]


def _forward(
    exchange: Exchange, backend: Backend, x: jax.Array, experts_TK: jax.Array,
    weights_TK: jax.Array, gate_up: Fp8Weight, down: Fp8Weight,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    with jax.named_scope("dispatch"):
        order = kept(exchange.order(experts_TK, gate_up.q.shape[0]))
        x_q = quantize_tiles(x, power_of_two=True, backend=backend)
        copies = exchange.dispatch_quantized(*x_q, order, backend)
    rows = Rows(order.sizes, x.dtype, backend)
    with jax.named_scope("routed_experts"):
        inner = rows.forward(copies, gate_up)
        h, cache = swiglu_quantize_both(inner, _used(order, experts_TK.size), backend=backend)
        results = rows.forward(h, down)
    with jax.named_scope("combine"):
        out = exchange.combine(results, order, weights_TK, backend)
    x_q, cache, *weights = as_bits((x_q, cache, gate_up, down))
    return out, (x_q, kept(cache), order, weights_TK, *weights)


def _used(order: Order, choices: int) -> jax.Array | None:
    """How many rows are somebody's, where there are more than this device's tokens have choices."""
    if len(order.choices) <= choices:
        return None
    return order.sizes.sum(dtype=jnp.int32, keepdims=True)


def _backward(exchange: Exchange, backend: Backend, saved: tuple, grad: jax.Array) -> tuple:
    x_q, cache, order, weights_TK, gate_up, down = from_bits(saved)
    rows = Rows(order.sizes, grad.dtype, backend)
    with jax.named_scope("combine"):
        grad_q = down.recipe.rows(grad, backend)
        grads = exchange.dispatch_quantized(*grad_q, order, backend)
        weights = exchange.by_row(weights_TK, order)
    with jax.named_scope("routed_experts"):
        d_h = rows.backward(grads, down)
        inner = swiglu_backward(
            *cache, d_h, weights, order.sizes, recipe=down.recipe, backend=backend
        )
        grads_t = turned(grads, order.sizes, backend)
        d_down = rows.weight_gradient(inner.h_t, grads_t, down)
        copies = exchange.dispatch_quantized(*x_q, order, backend)
        copies_t = turned(copies, order.sizes, backend)
        d_gate_up = rows.weight_gradient(copies_t, inner.grad_t, gate_up)
        d_copies = rows.backward(inner.grad, gate_up)
    with jax.named_scope("dispatch"):
        d_x = exchange.combine(d_copies, order, None, backend)
    no_gradient = np.zeros(weights_TK.shape, jax.dtypes.float0)
    counts = fp8_gauge.read(x_q, grad_q)
    d_weights = inner.d_weights
    if d_weights is not None:
        d_weights = exchange.by_choice(d_weights, order)
    return (
        d_x, no_gradient, d_weights,
        gate_up.cotangent(d_gate_up, counts), down.cotangent(d_down, counts),
    )  # fmt: skip


_experts.defvjp(_forward, _backward)
