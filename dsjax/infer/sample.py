"""Choosing a token from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def choose(
    logits: Float[Array, "b p"],
    key: jax.Array,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " b"]:
    """The likeliest token at temperature 0, else a draw from the nucleus of mass `top_p`."""
    greedy = jnp.argmax(logits, axis=-1)
    warm = logits / jnp.maximum(temperature, 1e-6)
    drawn = jax.random.categorical(key, _nucleus(warm, top_p), axis=-1)
    return jnp.where(temperature == 0, greedy, drawn).astype(jnp.int32)


def _nucleus(logits: Float[Array, "b p"], top_p: Float[Array, ""]) -> Float[Array, "b p"]:
    """Mask all but the likeliest tokens that together reach `top_p`; the first always stays."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
        ordered, axis=-1
    )
    kept = jnp.maximum((before < top_p).sum(axis=-1, keepdims=True), 1)
    cutoff = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logits >= cutoff, logits, -jnp.inf)
