"""FP8 matmuls of activations and weights: e4m3 operands, float32 scales, one for 1 x 128 of the
activations and one for 128 x 128 of the weights (DeepSeek-V3 report, section 3.3.2; DeepGEMM).

Products of 128 columns are scaled and added up in float32. The three share their rules:
K % 16 == 0 and N % 8 == 0, TMA's 16 bytes, any other size goes, zero included; none is
differentiable, see `fp8_linear`; `backend="auto"` is the kernel on Hopper and the jnp reference
elsewhere. `sum_bits` is for experiments: how many bits of a sum's fraction go from one block of 128
to the next. None keeps float32's; 13 are what the tensor core's own accumulator has (V3 report,
section 3.3.2), and show what sums cost that are not promoted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import checks
from pallas_kernels.gemm_backend import Backend, multiply, products

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Int32


def fp8_gemm(
    a: Float8e4m3fn[Array, "m k"],
    a_scale: Float[Array, "m k_blocks"],
    b: Float8e4m3fn[Array, "n k"],
    b_scale: Float[Array, "n_blocks k_blocks"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    sum_bits: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "m n"]:
    """`a @ b.T`.

    a [M, K] with a_scale [M, ceil(K / 128)], b [N, K] with b_scale [ceil(N / 128), ceil(K / 128)];
    a scale multiplies its values. The result is bfloat16 or float32. Raises ValueError on dtypes,
    shapes or a backend that do not fit, TypeError when differentiated.
    """
    checks.sum_bits(sum_bits)
    _check(a, a_scale, b, b_scale, out_dtype, "[M, K]", "[N, K]")
    return multiply(
        "fp8_gemm", "fp8_linear", products(backend).fp8_dense, a, a_scale, b, b_scale,
        shape=(a.shape[0], b.shape[0]), out_dtype=out_dtype, sum_bits=sum_bits,
    )  # fmt: skip


def fp8_grouped_gemm(
    a: Float8e4m3fn[Array, "m k"],
    a_scale: Float[Array, "m k_blocks"],
    b: Float8e4m3fn[Array, "g n k"],
    b_scale: Float[Array, "g n_blocks k_blocks"],
    group_sizes: Int32[Array, " g"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    sum_bits: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "m n"]:
    """`a[rows of group i] @ b[i].T` for every group: the rows of a are sorted by group.

    a and a_scale as in `fp8_gemm`, b [G, N, K] with b_scale [G, ceil(N / 128), ceil(K / 128)];
    group_sizes int32 [G] stays on the device. Groups may be empty and start at any row. The sizes
    should add up to M; output rows behind their sum are unspecified. Raises ValueError as
    `fp8_gemm` does, and for sizes below 0 or above M in sum; sizes that are being traced (under
    jit) cannot be checked. TypeError when differentiated.
    """
    checks.sum_bits(sum_bits)
    _check(a, a_scale, b, b_scale, out_dtype, "[M, K]", "[G, N, K]")
    checks.group_sizes(group_sizes, b.shape[0], a.shape[0])
    return multiply(
        "fp8_grouped_gemm", "fp8_grouped_linear", products(backend).fp8_grouped,
        a, a_scale, b, b_scale, group_sizes,
        shape=(a.shape[0], b.shape[1]), out_dtype=out_dtype, sum_bits=sum_bits,
    )  # fmt: skip


def fp8_masked_gemm(
    a: Float8e4m3fn[Array, "g m k"],
    a_scale: Float[Array, "g m k_blocks"],
    b: Float8e4m3fn[Array, "g n k"],
    b_scale: Float[Array, "g n_blocks k_blocks"],
    counts: Int32[Array, " g"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    backend: Backend = "auto",
) -> Float[Array, "g m n"]:
    """`a[i, :counts[i]] @ b[i].T` for every group, in buffers of M_max rows each (decoding).

    a [G, M_max, K] with a_scale [G, M_max, ceil(K / 128)], b as in `fp8_grouped_gemm`, counts
    int32 [G] on the device. Rows of a past a count may hold anything, those of the output are
    unspecified. Raises ValueError as `fp8_gemm` does, and for counts outside 0 to M_max unless
    they are being traced. TypeError when differentiated.
    """
    _check(a, a_scale, b, b_scale, out_dtype, "[G, M_max, K]", "[G, N, K]")
    checks.same("G", 0, a=a, b=b)
    checks.counts(counts, *a.shape[:2])
    return multiply(
        "fp8_masked_gemm", "fp8_grouped_linear", products(backend).fp8_masked,
        a, a_scale, b, b_scale, counts,
        shape=(*a.shape[:2], b.shape[1]), out_dtype=out_dtype,
    )  # fmt: skip


def _check(
    a: jax.Array,
    a_scale: jax.Array,
    b: jax.Array,
    b_scale: jax.Array,
    out_dtype: DTypeLike,
    a_form: str,
    b_form: str,
) -> None:
    checks.fp8("a", a, a_scale, a_form)
    checks.fp8("b", b, b_scale, b_form, rows=checks.BLOCK)
    checks.product(a, b)
    checks.out_dtype(out_dtype)
