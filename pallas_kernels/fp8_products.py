"""The three FP8 products of a layer whose weight is cast already (DeepSeek-V3 report, 3.3).

Groups of rows have a weight each where there are sizes; without, there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm
from pallas_kernels.fp8_wgrad import fp8_grouped_wgrad, fp8_wgrad

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from pallas_kernels.fp8_recipe import Pair
    from pallas_kernels.fp8_weight import Fp8Weight
    from pallas_kernels.gemm_backend import Backend


class Rows(NamedTuple):
    """How the rows of a product meet weights."""

    sizes: Int32[Array, " g"] | None
    dtype: jnp.dtype
    """Of results."""
    backend: Backend

    def forward(self, x: Pair, weight: Fp8Weight) -> Float[Array, "m n"]:
        """x @ w."""
        return self._multiply(x, (weight.q_t, weight.scale_t), weight)

    def backward(self, dy: Pair, weight: Fp8Weight) -> Float[Array, "m k"]:
        """dy @ w.T."""
        return self._multiply(dy, (weight.q, weight.scale), weight)

    def weight_gradient(self, x_t: Pair, dy_t: Pair, weight: Fp8Weight) -> Float[Array, "..."]:
        """x.T @ dy of transposed operands, rounded like other results, as the master has it."""
        how: Any = dict(out_dtype=self.dtype, sum_bits=weight.recipe.sum_bits, backend=self.backend)
        if self.sizes is None:
            found = fp8_wgrad(*x_t, *dy_t, **how)
        else:
            found = fp8_grouped_wgrad(*x_t, *dy_t, self.sizes, **how)
        return found.reshape(weight.master.shape).astype(weight.master.dtype)

    def _multiply(self, a: Pair, b: Pair, weight: Fp8Weight) -> jax.Array:
        how: Any = dict(out_dtype=self.dtype, sum_bits=weight.recipe.sum_bits, backend=self.backend)
        if self.sizes is None:
            return fp8_gemm(*a, *b, **how)
        return fp8_grouped_gemm(*a, *b, self.sizes, **how)
