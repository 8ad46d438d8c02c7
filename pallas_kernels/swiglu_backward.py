"""The backward pass of SwiGLU from its inputs' FP8 cache, quantised for the products that follow.

DeepSeek-V3's report, section 3.5.2: what enters SwiGLU is cached in FP8 and its output computed
again. With h = silu(gate) * up, and a weight for every row that h's product with the down
projection was multiplied with, one pass gives what three products want: gate_up's gradient in
tiles along its width and, like h times the weights, in tiles along the rows, transposed. Scales are
powers of two, and the transposed values those of the other form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks
from pallas_kernels.fp8_recipe import V3, Pair, Recipe, turned
from pallas_kernels.gemm_backend import Backend, takes_kernels
from pallas_kernels.quantize import TILE, dequantize, quantize_tiles

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Int32


class SwigluBackward(NamedTuple):
    grad: Pair
    """gate_up's gradient in tiles along its width,"""
    grad_t: Pair
    """and transposed, in tiles along the rows."""
    h_t: Pair
    """h, times the weights if given, transposed, in tiles along the rows."""
    d_weights: Float[Array, " m"] | None


def swiglu_backward(
    q: Float8e4m3fn[Array, "m two_f"],
    scale: Float[Array, "m tiles"],
    d_h: Float[Array, "m f"],
    weights: Float[Array, " m"] | None = None,
    group_sizes: Int32[Array, " g"] | None = None,
    *,
    recipe: Recipe = V3,
    backend: Backend = "auto",
) -> SwigluBackward:
    """All of `SwigluBackward` from gate_up's cache and h's gradient before its rows' weights.

    q and scale are `quantize_tiles` of gate_up [M, 2F], gate first; d_h [M, F] is bfloat16 or
    float32, weights float32 [M]. Rows lie in groups as in `quantize_both`; what is not transposed
    is undefined in rows of no group. Raises ValueError where dtypes or shapes do not fit.
    """
    checks.fp8("q", q, scale, "[M, 2F]")
    checks.multiple("2F", q.shape[1], 2)
    m, f = q.shape[0], q.shape[1] // 2
    checks.exact("d_h", d_h, (m, f), d_h.dtype)
    if weights is not None:
        checks.exact("weights", weights, (m,))
    if group_sizes is not None:
        checks.group_sizes(group_sizes, None, m)
    if takes_kernels(backend) and _fits(d_h) and not recipe.gradient_blocks:
        from pallas_kernels import sm90_swiglu_backward as kernels

        return SwigluBackward(*kernels.backward(q, scale, d_h, weights, group_sizes))
    grad, h, d_weights = _backward(dequantize(q, scale, jnp.float32), d_h, weights)
    along = recipe.rows(grad, backend)
    h_along = quantize_tiles(h, power_of_two=True, backend=backend)
    grad_t, h_t = (turned(pair, group_sizes, backend) for pair in (along, h_along))
    return SwigluBackward(along, grad_t, h_t, d_weights)


def _fits(d_h: jax.Array) -> bool:
    """Whether the kernel takes it: whole tiles of gate and of up."""
    return d_h.dtype == jnp.bfloat16 and d_h.shape[1] % TILE == 0 and d_h.size > 0


def _backward(
    gate_up: jax.Array, d_h: jax.Array, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """gate_up's gradient, h times the weights, and the weights' gradient, in float32."""
    gate, up = jnp.split(gate_up, 2, axis=1)
    d_h = d_h.astype(jnp.float32)
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    h = silu * up
    d_weights = None
    if weights is not None:
        d_weights = (d_h * h).sum(axis=1)
        d_h, h = d_h * weights[:, None], h * weights[:, None]
    d_gate = d_h * up * (sigmoid + silu * (1 - sigmoid))
    grad = jnp.concatenate([d_gate, d_h * silu], axis=1)
    return grad, h, d_weights
