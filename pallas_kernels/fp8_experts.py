"""Routed SwiGLU experts in FP8: tokens sorted by expert, two grouped products, a weighted sum.

Tokens are cast before they are copied to their experts, and so is the gradient of the sum, both
with scales that are powers of two as DeepSeek-V3 dispatches them (report, section 3.3.3). The
gradient meets the routing weights behind the down projection's backward product, where they are a
factor a row: d_h = w * (d_y @ down.T), and its product with h without w is w's own gradient, so the
experts' results need not be kept.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import checks, fp8_gauge
from pallas_kernels.fp8_products import Rows
from pallas_kernels.fp8_recipe import turned
from pallas_kernels.fp8_weight import Fp8Weight
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.kept import kept
from pallas_kernels.permute import combine_rows, spread_quantized
from pallas_kernels.quantize import FLOATS, quantize_tiles, swiglu_quantize_both
from pallas_kernels.swiglu_backward import swiglu_backward

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


class Order(NamedTuple):
    """Token copies sorted by expert."""

    choices: Int32[Array, " r"]
    """Of each row the token, times k, plus which of its k choices it is."""
    slots: Int32[Array, "T k"]
    """The row of each choice."""
    sizes: Int32[Array, " e"]

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


def fp8_experts(
    x: Float[Array, "T d"],
    experts_TK: Int32[Array, "T k"],
    weights_TK: Float[Array, "T k"],
    gate_up: Fp8Weight,
    down: Fp8Weight,
    *,
    backend: Backend = "auto",
) -> Float[Array, "T d"]:
    """The sum over a token's k experts e of weight * (silu(x @ gate_e) * (x @ up_e)) @ down_e.

    gate_up holds [E, D, 2F] with the gate first, down [E, F, D]; weights are float32, x bfloat16
    or float32, as the result. Differentiable in x, weights_TK and the masters. Raises ValueError
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
    return _experts(backend, x, experts_TK, weights_TK, gate_up, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(backend: Backend, *operands) -> jax.Array:
    return _forward(backend, *operands)[0]


def _forward(
    backend: Backend, x: jax.Array, experts_TK: jax.Array, weights_TK: jax.Array,
    gate_up: Fp8Weight, down: Fp8Weight,
) -> tuple[jax.Array, tuple]:  # fmt: skip
    with jax.named_scope("dispatch"):
        order = kept(sort_by_expert(experts_TK, gate_up.q.shape[0]))
        x_q = quantize_tiles(x, power_of_two=True, backend=backend)
        copies = spread_quantized(*x_q, order.slots, backend=backend)
    rows = Rows(order.sizes, x.dtype, backend)
    with jax.named_scope("routed_experts"):
        inner = rows.forward(copies, gate_up)
        h, cache = swiglu_quantize_both(inner, backend=backend)
        results = rows.forward(h, down)
    with jax.named_scope("combine"):
        out = combine_rows(results, order.slots, weights_TK, backend=backend)
    return out, (x_q, kept(cache), order, weights_TK, gate_up, down)


def _backward(backend: Backend, saved: tuple, grad: jax.Array) -> tuple:
    x_q, cache, order, weights_TK, gate_up, down = saved
    rows = Rows(order.sizes, grad.dtype, backend)
    with jax.named_scope("combine"):
        grad_q = down.recipe.rows(grad, backend)
        grads = spread_quantized(*grad_q, order.slots, backend=backend)
        weights = weights_TK.reshape(-1)[order.choices]
    with jax.named_scope("routed_experts"):
        d_h = rows.backward(grads, down)
        inner = swiglu_backward(
            *cache, d_h, weights, order.sizes, recipe=down.recipe, backend=backend
        )
        grads_t = turned(grads, order.sizes, backend)
        d_down = rows.weight_gradient(inner.h_t, grads_t, down)
        copies = spread_quantized(*x_q, order.slots, backend=backend)
        copies_t = turned(copies, order.sizes, backend)
        d_gate_up = rows.weight_gradient(copies_t, inner.grad_t, gate_up)
        d_copies = rows.backward(inner.grad, gate_up)
    with jax.named_scope("dispatch"):
        d_x = combine_rows(d_copies, order.slots, None, backend=backend)
    no_gradient = np.zeros(order.slots.shape, jax.dtypes.float0)
    counts = fp8_gauge.read(x_q, grad_q)
    d_weights = None if inner.d_weights is None else inner.d_weights[order.slots]
    return (
        d_x, no_gradient, d_weights,
        gate_up.cotangent(d_gate_up, counts), down.cotangent(d_down, counts),
    )  # fmt: skip


_experts.defvjp(_forward, _backward)
