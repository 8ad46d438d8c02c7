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


class Product(NamedTuple):
    """`a @ b.T` of two matrices, which may be computed beside something else."""

    a: Pair
    b: Pair
    dtype: jnp.dtype
    """Of the result."""
    sum_bits: int | None = None
    by_row: bool = False
    """Whether b has a scale for 1 x 128, not for 128 x 128."""

    def alone(self, backend: Backend = "auto") -> Float[Array, "m n"]:
        """The result, by a kernel that does nothing else."""
        multiply = fp8_wgrad if self.by_row else fp8_gemm
        return multiply(*self.a, *self.b, **self.how, backend=backend)

    @property
    def how(self) -> dict[str, Any]:
        return dict(out_dtype=self.dtype, sum_bits=self.sum_bits)


class Rows(NamedTuple):
    """How the rows of a product meet weights."""

    sizes: Int32[Array, " g"] | None
    dtype: jnp.dtype
    """Of results."""
    backend: Backend

    def forward(self, x: Pair, weight: Fp8Weight) -> Float[Array, "m n"]:
        """x @ w."""
        return self._multiply(self.forward_product(x, weight))

    def backward(self, dy: Pair, weight: Fp8Weight) -> Float[Array, "m k"]:
        """dy @ w.T."""
        return self._multiply(self.backward_product(dy, weight))

    def weight_gradient(self, x_t: Pair, dy_t: Pair, weight: Fp8Weight) -> Float[Array, "..."]:
        """x.T @ dy of transposed operands, rounded like other results, as the master has it."""
        found = self._multiply(self.weight_gradient_product(x_t, dy_t, weight))
        return as_master(found, weight)

    def forward_product(self, x: Pair, weight: Fp8Weight) -> Product:
        """Of `forward`; without groups it can be computed beside something else."""
        return Product(x, (weight.q_t, weight.scale_t), self.dtype, weight.recipe.sum_bits)

    def backward_product(self, dy: Pair, weight: Fp8Weight) -> Product:
        """The same of `backward`."""
        return Product(dy, (weight.q, weight.scale), self.dtype, weight.recipe.sum_bits)

    def weight_gradient_product(self, x_t: Pair, dy_t: Pair, weight: Fp8Weight) -> Product:
        """The same of `weight_gradient`, still to be given `as_master`."""
        return Product(x_t, dy_t, self.dtype, weight.recipe.sum_bits, by_row=True)

    def _multiply(self, product: Product) -> jax.Array:
        if self.sizes is None:
            return product.alone(self.backend)
        multiply = fp8_grouped_wgrad if product.by_row else fp8_grouped_gemm
        return multiply(*product.a, *product.b, self.sizes, **product.how, backend=self.backend)


def as_master(gradient: Float[Array, "..."], weight: Fp8Weight) -> Float[Array, "..."]:
    """A weight's gradient in its master's shape and format."""
    return gradient.reshape(weight.master.shape).astype(weight.master.dtype)
