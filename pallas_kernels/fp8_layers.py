"""Layers on FP8 weights that are cast once a step: projections and SwiGLU MLPs.

What the backward pass keeps is FP8: a layer's input in 1 x 128 tiles and, of an MLP, what enters
SwiGLU, whose output is computed again (DeepSeek-V3 report, sections 3.3.3 and 3.5.2). Gradients are
cast along both axes from one read; inputs are turned to 128 x 1 tiles from their FP8 values, which
changes none of these where scales are powers of two (but for the least).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax

from pallas_kernels import checks, fp8_gauge
from pallas_kernels.fp8_products import Rows
from pallas_kernels.fp8_weight import Fp8Weight
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.kept import as_bits, from_bits, kept
from pallas_kernels.quantize import (
    FLOATS,
    quantize_tiles,
    requantize_transposed,
    swiglu_quantize_both,
)
from pallas_kernels.swiglu_backward import swiglu_backward

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class How(NamedTuple):
    power_of_two: bool
    backend: Backend


def fp8_project(
    x: Float[Array, "m k"],
    weights: tuple[Fp8Weight, ...],
    *,
    power_of_two: bool = False,
    backend: Backend = "auto",
) -> tuple[Float[Array, "m n"], ...]:
    """`x @ w` for every weight [K, N], from one cast of x; differentiable in x and the masters.

    x [M, K] is bfloat16 or float32, results have its dtype. power_of_two: the scales of x, as V3
    has them behind attention. Raises ValueError where shapes or dtypes do not fit.
    """
    for weight in weights:
        _check(x, weight)
    return _project(How(power_of_two, backend), x, tuple(weights))


def fp8_mlp(
    x: Float[Array, "m k"],
    gate_up: Fp8Weight,
    down: Fp8Weight,
    *,
    backend: Backend = "auto",
) -> Float[Array, "m k"]:
    """SwiGLU MLP: `(silu(x @ gate) * (x @ up)) @ down`, gate_up [K, 2F] with the gate first.

    Differentiable in x and the masters; dtypes and errors as in `fp8_project`.
    """
    _check(x, gate_up)
    if 2 * down.q.shape[-2] != gate_up.q.shape[-1]:
        raise ValueError(
            f"down is {down.q.shape} and gate_up {gate_up.q.shape}: expected [F, N] and [K, 2F]"
        )
    return _mlp(How(True, backend), x, gate_up, down)


def _check(x: jax.Array, weight: Fp8Weight) -> None:
    checks.array("x", x, "[M, K]", *FLOATS)
    checks.array("weight", weight.q, "[K, N]", checks.E4M3)
    if x.shape[1] != weight.q.shape[0]:
        raise ValueError(f"x is {x.shape} and weight {weight.q.shape}: expected [M, K] and [K, N]")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(how: How, x: jax.Array, weights: tuple[Fp8Weight, ...]) -> tuple[jax.Array, ...]:
    return _project_forward(how, x, weights)[0]


def _project_forward(how: How, x: jax.Array, weights: tuple) -> tuple:
    rows = Rows(None, x.dtype, how.backend)
    x_q = quantize_tiles(x, power_of_two=how.power_of_two, backend=how.backend)
    return tuple(rows.forward(x_q, weight) for weight in weights), as_bits((x_q, weights))


def _project_backward(how: How, saved: tuple, grads: tuple[jax.Array, ...]) -> tuple:
    x_q, weights = from_bits(saved)
    rows = Rows(None, grads[0].dtype, how.backend)
    x_t = requantize_transposed(*x_q, power_of_two=how.power_of_two, backend=how.backend)
    d_x, d_weights = [], []
    for weight, grad in zip(weights, grads, strict=True):
        grad_q, grad_t = weight.recipe.both(grad, None, how.backend)
        d_x.append(rows.backward(grad_q, weight))
        d_master = rows.weight_gradient(x_t, grad_t, weight)
        d_weights.append(weight.cotangent(d_master, fp8_gauge.read(x_q, grad_q)))
    return sum(d_x[1:], d_x[0]), tuple(d_weights)


_project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(how: How, x: jax.Array, gate_up: Fp8Weight, down: Fp8Weight) -> jax.Array:
    return _mlp_forward(how, x, gate_up, down)[0]


def _mlp_forward(
    how: How, x: jax.Array, gate_up: Fp8Weight, down: Fp8Weight
) -> tuple[jax.Array, tuple]:
    rows = Rows(None, x.dtype, how.backend)
    x_q = quantize_tiles(x, power_of_two=how.power_of_two, backend=how.backend)
    inner = rows.forward(x_q, gate_up)
    h, cache = swiglu_quantize_both(inner, backend=how.backend)
    out = rows.forward(h, down)
    x_q, cache, *weights = as_bits((x_q, cache, gate_up, down))
    return out, (x_q, kept(cache), *weights)


def _mlp_backward(how: How, saved: tuple, grad: jax.Array) -> tuple:
    x_q, cache, gate_up, down = from_bits(saved)
    rows = Rows(None, grad.dtype, how.backend)
    grad_q, grad_t = down.recipe.both(grad, None, how.backend)
    d_h = rows.backward(grad_q, down)
    inner = swiglu_backward(*cache, d_h, recipe=down.recipe, backend=how.backend)
    d_down = rows.weight_gradient(inner.h_t, grad_t, down)
    x_t = requantize_transposed(*x_q, power_of_two=how.power_of_two, backend=how.backend)
    d_gate_up = rows.weight_gradient(x_t, inner.grad_t, gate_up)
    counts = fp8_gauge.read(x_q, grad_q)
    d_weights = gate_up.cotangent(d_gate_up, counts), down.cotangent(d_down, counts)
    return rows.backward(inner.grad, gate_up), *d_weights


_mlp.defvjp(_mlp_forward, _mlp_backward)
