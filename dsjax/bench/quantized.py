"""Values in e4m3 with their scales, as benchmarks hand them to the kernels and get them back."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

from pallas_kernels.quantize import dequantize


class Quantized(NamedTuple):
    """e4m3 rows, and their scales transposed: so the FP8 products read them, and what is stored
    that way is not copied inside a timed call."""

    q: Float8e4m3fn[Array, "m k"]
    scale_t: Float[Array, "tiles m"]

    @property
    def pair(self) -> tuple[jax.Array, jax.Array]:
        """Values and scales as the public functions take them."""
        return self.q, self.scale_t.T

    def numbers(self) -> Float[Array, "m k"]:
        return dequantize(*self.pair, jnp.float32, block_rows=1)


def quantized(*found: jax.Array) -> tuple[Quantized, ...]:
    """What the public functions give, values and scales in turn."""
    return tuple(Quantized(q, s.T) for q, s in zip(found[::2], found[1::2], strict=True))
