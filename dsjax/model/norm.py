"""RMSNorm; its backward pass computes it again from its input (DeepSeek-V3 report, 3.2.3)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "... d"], weight: Float[Array, " d"], eps: float
) -> Float[Array, "... d"]:
    """Scale x to unit root mean square (in float32), times the weight, in x's dtype."""
    return (_unit(x, eps)[0] * weight.astype(jnp.float32)).astype(x.dtype)


def _unit(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * scale, scale


def _forward(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    return rms_norm(x, weight, eps), (x, weight)


def _backward(eps: float, saved: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    unit, scale = _unit(x, eps)
    grad = grad.astype(jnp.float32)
    d_weight = (grad * unit).sum(axis=tuple(range(x.ndim - 1)))
    d_unit = grad * weight.astype(jnp.float32)
    d_x = scale * (d_unit - unit * jnp.mean(d_unit * unit, axis=-1, keepdims=True))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


rms_norm.defvjp(_forward, _backward)
