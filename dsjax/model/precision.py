"""What is computed in which format.

Norms, the router, softmax, rotary angles and the loss are always float32. Everything that is a
matrix product goes through `project`, the one door at which a format is chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from dsjax.config import Precision

COMPUTE_DTYPE = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


def compute_dtype(precision: Precision) -> jnp.dtype:
    """The dtype of activations; raises ValueError for a precision that does not exist."""
    if precision not in COMPUTE_DTYPE:
        raise ValueError(f"precision is {precision!r}: use one of {', '.join(COMPUTE_DTYPE)}")
    return jnp.dtype(COMPUTE_DTYPE[precision])


def exactness(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products for float32: a GPU would take TF32 otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def project(equation: str, x: Float[Array, ...], w: Float[Array, ...]) -> Float[Array, ...]:
    """`einsum(equation, x, w)` with the weight brought to x's format, result in x's format."""
    return jnp.einsum(equation, x, w.astype(x.dtype), precision=exactness(x.dtype))


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
