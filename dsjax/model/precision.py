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
