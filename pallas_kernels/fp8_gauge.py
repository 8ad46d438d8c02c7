"""What FP8 loses, counted where it is cast: read as the gradient of a weight's gauge.

A layer that takes a weight with a gauge, zeros [3], makes these counts the gauge's gradient, so
that they leave the backward pass beside the weight's own:

* the share of the layer's inputs that are 0 in FP8, and that of its outputs' gradients, by a sample
  of rows: reading all of them would take a hundredth of a training step;
* tiles of either that are not finite: a scale follows its tile's largest value, so that nothing
  else overflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from pallas_kernels.fp8_recipe import Pair

GAUGES = 3
SAMPLED = 1024  # rows
MAGNITUDE = 0x7F


def new_gauge(*leading: int) -> Float[Array, "*leading 3"]:
    return jnp.zeros((*leading, GAUGES), jnp.float32)


def read(inputs: Pair, gradients: Pair) -> Float[Array, "3"]:
    """One layer's counts."""
    lost = sum(jnp.sum(~jnp.isfinite(scale)) for _, scale in (inputs, gradients))
    return jnp.stack([_zeros(inputs[0]), _zeros(gradients[0]), jnp.float32(lost)])


def shares(devices: int) -> Float[Array, "3"]:
    """What a device's counts weigh in those of all: shares are averaged, tiles add up."""
    return jnp.array([1 / devices, 1 / devices, 1], jnp.float32)


def _zeros(q: jax.Array) -> jax.Array:
    sample = q[:: max(1, len(q) // SAMPLED)]
    magnitude = jax.lax.bitcast_convert_type(sample, jnp.uint8) & MAGNITUDE
    return jnp.mean(magnitude == 0, dtype=jnp.float32)
