"""How FP8 layers cast, and what their sums keep: DeepSeek-V3's recipe, or a departure from it.

The two departures are the report's own negative controls: sums that stay in the tensor core's
accumulator (section 3.3.2) and gradients in blocks of 128 x 128 (appendix B.2).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.gemm_backend import Backend
from pallas_kernels.quantize import (
    TILE,
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    requantize_transposed,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

Pair = tuple[jax.Array, jax.Array]
"""e4m3 values and their scales."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    sum_bits: int | None = None
    """Of sums' fractions from one block of K to the next, as in `fp8_gemm`."""
    gradient_blocks: bool = False
    """A scale for 128 x 128 of a gradient, not for 1 x 128 and 128 x 1."""

    def rows(self, grad: Float[Array, "m k"], backend: Backend) -> Pair:
        """A gradient's tiles along K, with scales that are powers of two."""
        if self.gradient_blocks:
            return _in_blocks(grad, backend)
        return quantize_tiles(grad, power_of_two=True, backend=backend)

    def both(
        self, grad: Float[Array, "m k"], sizes: Int32[Array, " g"] | None, backend: Backend,
        *, power_of_two: bool = False,
    ) -> tuple[Pair, Pair]:  # fmt: skip
        """A gradient's tiles along K, and of its transpose along M, by groups of rows if given.

        power_of_two: the scales, as those of `rows`.
        """
        if self.gradient_blocks:
            rows = _in_blocks(grad, backend)
            return rows, turned(rows, sizes, backend)
        q, scale, q_t, scale_t = quantize_both(
            grad, sizes, power_of_two=power_of_two, backend=backend
        )
        return (q, scale), (q_t, scale_t)


V3 = Recipe()


def turned(rows: Pair, sizes: Int32[Array, " g"] | None, backend: Backend) -> Pair:
    """The transpose in tiles along M: the same values, as scales are powers of two."""
    return requantize_transposed(*rows, sizes, power_of_two=True, backend=backend)


def _in_blocks(grad: jax.Array, backend: Backend) -> Pair:
    q, scale = quantize_blocks(grad, power_of_two=True, backend=backend)
    return q, jnp.repeat(scale, TILE, axis=0)[: len(grad)]
