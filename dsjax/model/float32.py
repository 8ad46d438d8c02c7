"""Products that keep float32's accuracy: the router's, the head's, and all of a float32 model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def exactness(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products for float32: a GPU would take TF32 otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def float32_product(x: Float[Array, "t d"], w: Float[Array, "d e"]) -> Float[Array, "t e"]:
    """`x @ w` of a float32 w with float32's accuracy, in float32.

    A GPU multiplies float32 without tensor cores. A bfloat16 x meets w as a sum of three bfloat16
    numbers instead, side by side in one product, which loses nothing.
    """
    if x.dtype == jnp.bfloat16:
        return _in_parts(x, w)
    return jnp.matmul(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _in_parts(x: jax.Array, w: jax.Array) -> jax.Array:
    return _float32_sum(x, jnp.concatenate(_parts(w), axis=1)).reshape(len(x), 3, -1).sum(axis=1)


def _in_parts_bwd(saved: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    by_parts = _float32_sum(x.T, jnp.concatenate(_parts(grad), axis=1))
    # Of nine products the three largest: the others are 2**-16 of these, and x has 8 bits.
    (high, middle, _), (w_high, w_middle, _) = _parts(grad), _parts(w)
    left = jnp.concatenate([high, middle, high], axis=1)
    right = jnp.concatenate([w_high, w_high, w_middle], axis=1)
    return _float32_sum(left, right.T).astype(x.dtype), by_parts.reshape(*w.shape[:1], 3, -1).sum(1)


_in_parts.defvjp(lambda x, w: (_in_parts(x, w), (x, w)), _in_parts_bwd)


def _parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 numbers that add up to x but for a part in 2**24."""
    parts = []
    for _ in range(3):
        # XLA may leave out a cast to bfloat16 and back, but not this.
        part = jax.lax.reduce_precision(x, 8, 7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def _float32_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def project_to_logits(
    hidden: Float[Array, "... d"], head: Float[Array, "d p"]
) -> Float[Array, "... p"]:
    """Float32 logits from operands in hidden's format; the backward products stay in it too."""
    return jnp.einsum(
        "...d,dp->...p",
        hidden,
        head,
        precision=exactness(hidden.dtype),
        preferred_element_type=jnp.float32,
    )


def _logits_fwd(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, tuple]:
    return project_to_logits(hidden, head), (hidden, head)


def _logits_bwd(saved: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, head = saved
    grad, exact = grad.astype(hidden.dtype), exactness(hidden.dtype)
    d_hidden = jnp.einsum("...p,dp->...d", grad, head, precision=exact)
    return d_hidden, jnp.einsum("...d,...p->dp", hidden, grad, precision=exact)


project_to_logits.defvjp(_logits_fwd, _logits_bwd)
