"""Keeping experts evenly loaded without a loss (arXiv 2408.15664), and how uneven they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def updated_bias(
    bias_E: Float[Array, "*l e"], load_E: Int[Array, "*l e"], speed: Float[Array, ""]
) -> Float[Array, "*l e"]:
    """Raise the bias of underloaded experts by `speed`, lower that of overloaded ones."""
    load = load_E.astype(jnp.float32)
    return bias_E + speed * jnp.sign(load.mean(axis=-1, keepdims=True) - load)


def max_violation(load_E: Int[Array, "*l e"]) -> Float[Array, "*l"]:
    """MaxVio: the heaviest load above the mean, in means; 0 is even, e / k - 1 is the worst."""
    load = load_E.astype(jnp.float32)
    mean = load.mean(axis=-1)
    return (load.max(axis=-1) - mean) / jnp.maximum(mean, 1e-9)
