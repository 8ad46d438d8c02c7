"""FP8 weight gradients: both operands e4m3 with a float32 scale for every 1 x 128.

The columns of both are tokens, 128 to a scale: outputs' gradients and inputs quantised along the
tokens and stored transposed (DeepSeek-V3 report, section 3.3.2 and figure 7). N % 8 == 0; neither
is differentiable; `backend="auto"` is the kernel on Hopper and the jnp reference elsewhere.
`sum_bits` as in `fp8_gemm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import checks
from pallas_kernels.gemm_backend import Backend, multiply, products

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Int32


def fp8_wgrad(
    a: Float8e4m3fn[Array, "m k"],
    a_scale: Float[Array, "m k_blocks"],
    b: Float8e4m3fn[Array, "n k"],
    b_scale: Float[Array, "n k_blocks"],
    *,
    accumulate: Float[Array, "m n"] | None = None,
    out_dtype: DTypeLike = jnp.float32,
    sum_bits: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "m n"]:
    """`a @ b.T`, plus `accumulate`, summed in float32 and given in out_dtype.

    a [M, K] and b [N, K] with scales [M, ceil(K / 128)] and [N, ceil(K / 128)]; accumulate is
    float32 [M, N], with which out_dtype has to be float32. K % 16 == 0. Raises ValueError on
    dtypes, shapes or a backend that do not fit, TypeError when differentiated.
    """
    checks.sum_bits(sum_bits)
    _check(a, a_scale, b, b_scale)
    return _multiply(
        "fp8_wgrad", "fp8_linear", products(backend).fp8_wgrad, a, a_scale, b, b_scale,
        accumulate=accumulate, out_dtype=out_dtype, sum_bits=sum_bits,
        shape=(a.shape[0], b.shape[0]),
    )  # fmt: skip


def fp8_grouped_wgrad(
    a: Float8e4m3fn[Array, "m k"],
    a_scale: Float[Array, "m k_blocks"],
    b: Float8e4m3fn[Array, "n k"],
    b_scale: Float[Array, "n k_blocks"],
    group_sizes: Int32[Array, " g"],
    *,
    accumulate: Float[Array, "g m n"] | None = None,
    out_dtype: DTypeLike = jnp.float32,
    sum_bits: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "g m n"]:
    """`a[:, columns of group i] @ b[:, columns of group i].T`, plus `accumulate`.

    a [M, K] and b [N, K] with scales [M, K / 128] and [N, K / 128], K % 128 == 0. Group i has
    ceil(group_sizes[i] / 128) whole blocks of 128 columns, one group behind the other, and zeros in
    the columns past its size: the transposed form of `quantize_both(x, group_sizes)`. An empty
    group gives zeros; columns behind the groups may hold anything. group_sizes is int32 [G] on the
    device, accumulate float32 [G, M, N]; out_dtype as in `fp8_wgrad`. Raises ValueError on dtypes,
    shapes or a backend that do not fit, and for sizes below 0 or above K in all, unless they are
    being traced (under jit). TypeError when differentiated.
    """
    checks.sum_bits(sum_bits)
    _check(a, a_scale, b, b_scale)
    checks.multiple("K", a.shape[1], checks.BLOCK)
    checks.group_sizes(group_sizes, None, a.shape[1], "K", unit=checks.BLOCK)
    return _multiply(
        "fp8_grouped_wgrad", "fp8_grouped_linear", products(backend).fp8_grouped_wgrad,
        a, a_scale, b, b_scale, group_sizes,
        accumulate=accumulate, out_dtype=out_dtype, sum_bits=sum_bits,
        shape=(group_sizes.shape[0], a.shape[0], b.shape[0]),
    )  # fmt: skip


def _check(a: jax.Array, a_scale: jax.Array, b: jax.Array, b_scale: jax.Array) -> None:
    checks.fp8("a", a, a_scale, "[M, K]")
    checks.fp8("b", b, b_scale, "[N, K]")
    checks.product(a, b)


def _multiply(
    name: str,
    instead: str,
    product: Callable[..., jax.Array],
    *operands: jax.Array,
    accumulate: jax.Array | None,
    out_dtype: DTypeLike,
    sum_bits: int | None,
    shape: tuple[int, ...],
) -> jax.Array:
    checks.out_dtype(out_dtype)
    if accumulate is not None:
        checks.exact("accumulate", accumulate, shape)
        if jnp.dtype(out_dtype) != jnp.float32:
            raise ValueError(
                f"out_dtype is {jnp.dtype(out_dtype)} with accumulate: expected float32"
            )
        if not operands[0].size:  # no columns to add, or nothing to add them to
            return accumulate
    return multiply(name, instead, product, *operands, accumulate, shape=shape,
                    out_dtype=out_dtype, sum_bits=sum_bits)  # fmt: skip
