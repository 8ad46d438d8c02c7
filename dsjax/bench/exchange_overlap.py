"""The timed calls of an exchange beside a product, and of the same two in turn.

The product is `[T, d] x [d, d]` in FP8, about what V3's shared expert has. What the one takes less
than the other is how much of the exchange the product hides.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.expert_exchange import combine_rows, dispatch_quantized
from pallas_kernels.expert_overlap import combine_beside, dispatch_beside
from pallas_kernels.fp8_products import Product

WEIGHT = "q", "scale", "w", "w_scale"


def _product(q: jax.Array, scale: jax.Array, w: jax.Array, w_scale: jax.Array) -> Product:
    return Product((q, scale), (w, w_scale), jnp.dtype(jnp.bfloat16))


def dispatch_and_product(how: Any, q: jax.Array, scale: jax.Array, *others: jax.Array) -> Any:
    w, w_scale, *way = others
    moved = dispatch_quantized(q, scale, *way, rows=how.rows, **how.remote)
    return *moved, _product(q, scale, w, w_scale).alone(how.backend)


def dispatch_beside_product(how: Any, q: jax.Array, scale: jax.Array, *others: jax.Array) -> Any:
    w, w_scale, *way = others
    product = _product(q, scale, w, w_scale)
    result, moved = dispatch_beside(product, q, scale, *way, rows=how.rows, **how.remote)
    return *moved, result


def combine_and_product(how: Any, *operands: jax.Array) -> Any:
    *product, rows, to, slots, weights, tokens, count = operands
    sums = combine_rows(rows, slots, weights, tokens, count, to, **how.remote)
    return sums, _product(*product).alone(how.backend)


def combine_beside_product(how: Any, *operands: jax.Array) -> Any:
    *product, rows, to, slots, weights, tokens, count = operands
    known = slots, weights, tokens, count, to
    result, sums = combine_beside(_product(*product), rows, *known, **how.remote)
    return sums, result
