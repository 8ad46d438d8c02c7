"""What FP8 loses, counted where it is cast: read as the gradient of a weight's gauge.

A layer that takes a weight with a gauge, zeros [3], makes these counts the gauge's gradient, so
that they leave the backward pass beside the weight's own:

* the share of the layer's inputs that are 0 in FP8;
* the share of its outputs' gradients that are 0 in FP8;
* values of either that are not finite, with their whole tiles: a scale follows its tile's largest
  value, so that nothing else overflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.fp8_recipe import Pair

GAUGES = 3
MAGNITUDE = 0x7F  # the bits of one; NaN has them all


def new_gauge(*leading: int) -> Float[Array, "*leading 3"]:
    return jnp.zeros((*leading, GAUGES), jnp.float32)


def read(inputs: Pair, gradients: Pair) -> Float[Array, "3"]:
    """One layer's counts, of the values alone: where a scale is not finite, they are NaN."""
    zeros, nan = _lost(inputs[0])
    gradient_zeros, gradient_nan = _lost(gradients[0])
    shares = zeros / inputs[0].size, gradient_zeros / gradients[0].size
    return jnp.stack([*shares, (nan + gradient_nan).astype(jnp.float32)])


def _lost(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    magnitude = jax.lax.bitcast_convert_type(q, jnp.uint8) & MAGNITUDE
    return jnp.sum(magnitude == 0), jnp.sum(magnitude == MAGNITUDE)
