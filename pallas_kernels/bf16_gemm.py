"""BF16 matmuls, float32 inside: dense, by groups of rows, in masked buffers, and the weight
gradient of groups. The layouts are those of `fp8_gemm` without scales.

K and N are multiples of 8, TMA's 16 bytes; any other size goes, zero included. None of the four is
differentiable, each is a product that a gradient is made of (`grouped_gemm` has gradients);
`backend="auto"` is the kernel on Hopper and the jnp reference elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import checks
from pallas_kernels.gemm_backend import Backend, multiply, products

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float, Int32


def bf16_gemm(
    a: BFloat16[Array, "m k"],
    b: BFloat16[Array, "n k"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    backend: Backend = "auto",
) -> Float[Array, "m n"]:
    """`a @ b.T` in bfloat16 or float32.

    Raises ValueError on dtypes, shapes or a backend that do not fit, TypeError when differentiated.
    """
    _check(a, b, out_dtype, "[M, K]", "[N, K]")
    return multiply(
        "bf16_gemm", "jnp.matmul", products(backend).bf16_dense, a, b,
        shape=(a.shape[0], b.shape[0]), out_dtype=out_dtype,
    )  # fmt: skip


def bf16_grouped_gemm(
    a: BFloat16[Array, "m k"],
    b: BFloat16[Array, "g n k"],
    group_sizes: Int32[Array, " g"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    backend: Backend = "auto",
) -> Float[Array, "m n"]:
    """`a[rows of group i] @ b[i].T` for every group: the rows of a are sorted by group.

    group_sizes int32 [G] stays on the device. Groups may be empty and start at any row. The sizes
    should add up to M; output rows behind their sum are unspecified. Raises ValueError as
    `bf16_gemm` does, and for sizes below 0 or above M in sum, unless they are being traced (under
    jit). TypeError when differentiated.
    """
    _check(a, b, out_dtype, "[M, K]", "[G, N, K]")
    checks.group_sizes(group_sizes, b.shape[0], a.shape[0])
    return multiply(
        "bf16_grouped_gemm", "grouped_gemm", products(backend).bf16_grouped, a, b, group_sizes,
        shape=(a.shape[0], b.shape[1]), out_dtype=out_dtype,
    )  # fmt: skip


def bf16_masked_gemm(
    a: BFloat16[Array, "g m k"],
    b: BFloat16[Array, "g n k"],
    counts: Int32[Array, " g"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    backend: Backend = "auto",
) -> Float[Array, "g m n"]:
    """`a[i, :counts[i]] @ b[i].T` for every group, in buffers of M_max rows each (decoding).

    counts is int32 [G] on the device. Rows of a past a count may hold anything, those of the
    output are unspecified. Raises ValueError as `bf16_gemm` does, and for counts outside 0 to
    M_max unless they are being traced. TypeError when differentiated.
    """
    _check(a, b, out_dtype, "[G, M_max, K]", "[G, N, K]")
    checks.same("G", 0, a=a, b=b)
    checks.counts(counts, *a.shape[:2])
    return multiply(
        "bf16_masked_gemm", "jnp.einsum", products(backend).bf16_masked, a, b, counts,
        shape=(*a.shape[:2], b.shape[1]), out_dtype=out_dtype,
    )  # fmt: skip


def bf16_grouped_wgrad(
    x: BFloat16[Array, "t k"],
    dy: BFloat16[Array, "t n"],
    group_sizes: Int32[Array, " g"],
    *,
    out_dtype: DTypeLike = jnp.float32,
    backend: Backend = "auto",
) -> Float[Array, "g k n"]:
    """`x[rows of group i].T @ dy[rows of group i]` for every group, zeros for an empty one.

    The rows of both are sorted by group, group_sizes is int32 [G] on the device; rows behind the
    groups may hold anything. Raises ValueError on dtypes, shapes or a backend that do not fit, and
    for sizes below 0 or above T in sum, unless they are being traced (under jit). TypeError when
    differentiated.
    """
    checks.array("x", x, "[T, K]", jnp.bfloat16)
    checks.array("dy", dy, "[T, N]", jnp.bfloat16)
    checks.same("T", 0, x=x, dy=dy)
    checks.multiple("K", x.shape[1], checks.N_STEP)
    checks.multiple("N", dy.shape[1], checks.N_STEP)
    checks.out_dtype(out_dtype)
    checks.group_sizes(group_sizes, None, x.shape[0], "T")
    return multiply(
        "bf16_grouped_wgrad", "grouped_gemm", products(backend).bf16_grouped_wgrad,
        x, dy, group_sizes,
        shape=(group_sizes.shape[0], x.shape[1], dy.shape[1]), out_dtype=out_dtype,
    )  # fmt: skip


def _check(a: jax.Array, b: jax.Array, out_dtype: DTypeLike, a_form: str, b_form: str) -> None:
    checks.array("a", a, a_form, jnp.bfloat16)
    checks.array("b", b, b_form, jnp.bfloat16)
    checks.product(a, b)
    checks.out_dtype(out_dtype)
