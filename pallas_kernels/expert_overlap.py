"""Exchanges of tokens between GPUs beside an FP8 product, in one kernel (DeepEP's SM budget).

DeepSeek-V3 hides dispatch and combine behind computation on the SMs that these leave (report,
section 3.2.1; DeepEP's `num_sms`). A kernel that multiplies takes every SM it is given, and XLA
starts one kernel after the other, so here both are one: most SMs multiply, some move rows. What
comes out has the bits of `Product.alone` and of the exchange by itself, which is also what runs
where there are no kernels for it or the product is of few rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from pallas_kernels import checks
from pallas_kernels.expert_exchange import (
    combine_rows,
    constant,
    dispatch_quantized,
    peers_for_quantized,
    peers_for_sums,
)
from pallas_kernels.gemm_backend import Backend

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float8e4m3fn, Float32, Int32

    from pallas_kernels.expert_exchange import Axis
    from pallas_kernels.fp8_products import Product

MOST_FEW = 128
"""Rows of a product that is over before anything has moved."""
MOST_CTAS = 100
"""Of 132, of which collectives of NCCL may hold 32: all that wait for other ranks have to run."""


def dispatch_beside(
    product: Product,
    q: Float8e4m3fn[Array, "T d"],
    scale: Float32[Array, "T tiles"],
    slots: Int32[Array, "R*T k"],
    tokens: Int32[Array, " R*T"],
    count: Int32[Array, " 1"],
    *,
    rows: int,
    axis: Axis,
    ctas: int | None = None,
    backend: Backend = "auto",
) -> tuple[jax.Array, tuple[Float8e4m3fn[Array, "rows d"], Float32[Array, "rows tiles"]]]:
    """(product.alone(), dispatch_quantized(...)), whose arguments and errors are those of both.

    `ctas` SMs move rows, 1 to 100 of them.
    """
    _check(product, ctas)
    given = q, scale, slots, tokens, count
    peers = peers_for_quantized(*given, rows, axis, ctas, backend)
    if not peers or not _long(product):
        how: Any = dict(rows=rows, axis=axis, ctas=ctas, backend=backend)
        return product.alone(backend), dispatch_quantized(*given, **how)
    from pallas_kernels import sm90_fp8_beside as sm90

    given = constant(q), constant(scale), slots, tokens, count
    how = dict(rows=rows, peers=peers, ctas=ctas or sm90.DISPATCH_CTAS)
    return sm90.dispatch_quantized(_operands(product), *given, **how, **_static(product))


def combine_beside(
    product: Product,
    y: Float[Array, "rows d"],
    slots: Int32[Array, "R*T k"],
    weights: Float32[Array, "R*T k"] | None,
    tokens: Int32[Array, " R*T"],
    count: Int32[Array, " 1"],
    ranks: Bool[Array, "T R"] | Int32[Array, "T R"],
    *,
    axis: Axis,
    ctas: int | None = None,
    backend: Backend = "auto",
) -> tuple[jax.Array, Float[Array, "T d"]]:
    """(product.alone(), combine_rows(...)), whose arguments and errors are those of both.

    `ctas` SMs move rows, 1 to 100 of them.
    """
    _check(product, ctas)
    given = y, slots, weights, tokens, count, ranks
    peers = peers_for_sums(*given, axis, ctas, backend)
    if not peers or not _long(product):
        how: Any = dict(axis=axis, ctas=ctas, backend=backend)
        return product.alone(backend), combine_rows(*given, **how)
    from pallas_kernels import sm90_fp8_beside as sm90

    weights = weights if weights is None else constant(weights)
    how = dict(peers=peers, ctas=ctas or sm90.COMBINE_CTAS)
    given = constant(y), slots, weights, ranks
    return sm90.combine_push(_operands(product), *given, **how, **_static(product))


def _check(product: Product, ctas: int | None) -> None:
    checks.fp8("a", *product.a, "[M, K]")
    checks.fp8("b", *product.b, "[N, K]", rows=1 if product.by_row else checks.BLOCK)
    checks.product(product.a[0], product.b[0])
    checks.out_dtype(product.dtype)
    if ctas is not None and not 1 <= ctas <= MOST_CTAS:
        raise ValueError(f"ctas is {ctas}: expected 1 to {MOST_CTAS}, which leave the others free")


def _long(product: Product) -> bool:
    (a, _), (b, _) = product.a, product.b
    return a.shape[0] > MOST_FEW and a.size > 0 and b.size > 0


def _operands(product: Product) -> tuple[jax.Array, ...]:
    return tuple(constant(x) for x in (*product.a, *product.b))


def _static(product: Product) -> dict[str, Any]:
    return dict(by_row=product.by_row, **product.how)
