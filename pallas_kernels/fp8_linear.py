"""Linear layers whose three products are FP8 (DeepSeek-V3 report, section 3.3, figures 6 and 7).

* `out = x @ w.T`: x has a scale for 1 x 128, w for 128 x 128;
* `dx = dy @ w`: dy has a scale for 1 x 128, w is the same FP8 values and scales, transposed;
* `dw = dy.T @ x`: both have a scale for 128 tokens of a column; x is quantised anew from its FP8.

The backward pass keeps x and w in FP8 only. Scales and sums are float32.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels import checks
from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm
from pallas_kernels.fp8_wgrad import fp8_grouped_wgrad, fp8_wgrad
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.kept import as_bits, from_bits
from pallas_kernels.quantize import (
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    requantize_transposed,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]

FLOATS = (jnp.bfloat16, jnp.float32)
WIDTH_STEP = 16  # each of K and N is the summed axis of one of the products


def fp8_linear(
    x: Float[Array, "*tokens k"], w: Float[Array, "n k"], *, backend: Backend = "auto"
) -> Float[Array, "*tokens n"]:
    """`x @ w.T`, differentiable in x and w.

    x [..., K] and w [N, K] are bfloat16 or float32, of any size; K or N that is no multiple of 16
    costs a copy with zeros. The result has x's dtype, each gradient that of its argument. Inside
    `jax.shard_map` pass it `check_vma=False`. Raises ValueError on dtypes, shapes or a backend
    that do not fit.
    """
    _check(x, w, "[..., K]", "[N, K]")
    tokens = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _multiply(tokens, w, None, backend).reshape(*x.shape[:-1], w.shape[0])


def fp8_grouped_linear(
    x: Float[Array, "t k"],
    w: Float[Array, "g n k"],
    group_sizes: Int32[Array, " g"],
    *,
    backend: Backend = "auto",
) -> Float[Array, "t n"]:
    """`x[rows of group i] @ w[i].T` for every group, differentiable in x and w.

    x [T, K] has its rows sorted by group, group_sizes is int32 [G] on the device; groups may be
    empty and start at any row. The sizes should add up to T: rows behind their sum are unspecified
    in the result and in x's gradient, and do not enter w's. Sizes and dtypes as in `fp8_linear`.
    Raises ValueError as it does, and for sizes below 0 or above T in sum, unless they are being
    traced (under jit).
    """
    _check(x, w, "[T, K]", "[G, N, K]")
    checks.group_sizes(group_sizes, w.shape[0], x.shape[0], "T")
    return _multiply(x, w, group_sizes, backend)


def _check(x: jax.Array, w: jax.Array, x_form: str, w_form: str) -> None:
    checks.array("x", x, x_form, *FLOATS)
    checks.array("w", w, w_form, *FLOATS)
    checks.same("K", -1, x=x, w=w)


def _multiply(x: jax.Array, w: jax.Array, sizes: jax.Array | None, backend: Backend) -> jax.Array:
    n = w.shape[-2]
    if not x.size or not w.size:
        return jnp.zeros((x.shape[0], n), x.dtype)
    filled = _linear(_fill(x, 1), _fill(w, w.ndim - 2, w.ndim - 1), sizes, w.dtype, backend)
    return filled[:, :n]


def _fill(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros behind the end of those axes, up to a multiple of WIDTH_STEP."""
    ends = [(0, -size % WIDTH_STEP if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, ends) if any(end for _, end in ends) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(
    x: jax.Array, w: jax.Array, sizes: jax.Array | None, w_dtype: DTypeLike, backend: Backend
) -> jax.Array:
    """Rows times the transposed weight, by groups where there are sizes."""
    return _forward(x, w, sizes, w_dtype, backend)[0]


def _forward(
    x: jax.Array, w: jax.Array, sizes: jax.Array | None, w_dtype: DTypeLike, backend: Backend
) -> tuple[jax.Array, Saved]:
    x_q, x_scale = quantize_tiles(x, backend=backend)
    w_q, w_scale = quantize_blocks(w, backend=backend)
    out = _rows(x_q, x_scale, w_q, w_scale, sizes, x.dtype, backend)
    return out, as_bits((x_q, x_scale, w_q, w_scale, sizes))


def _backward(
    w_dtype: DTypeLike, backend: Backend, saved: Saved, dy: jax.Array
) -> tuple[jax.Array, jax.Array, np.ndarray | None]:
    x_q, x_scale, w_q, w_scale, sizes = from_bits(saved)
    dy_q, dy_scale, dy_t, dy_t_scale = quantize_both(dy, sizes, backend=backend)
    x_t, x_t_scale = requantize_transposed(x_q, x_scale, sizes, backend=backend)
    back, back_scale = w_q.swapaxes(-1, -2), w_scale.swapaxes(-1, -2)
    d_x = _rows(dy_q, dy_scale, back, back_scale, sizes, dy.dtype, backend)
    columns = (dy_t, dy_t_scale, x_t, x_t_scale)
    if sizes is None:
        return d_x, fp8_wgrad(*columns, backend=backend).astype(w_dtype), None
    d_w = fp8_grouped_wgrad(*columns, sizes, backend=backend).astype(w_dtype)
    return d_x, d_w, np.zeros(sizes.shape, jax.dtypes.float0)


def _rows(
    q: jax.Array,
    scale: jax.Array,
    w_q: jax.Array,
    w_scale: jax.Array,
    sizes: jax.Array | None,
    dtype: DTypeLike,
    backend: Backend,
) -> jax.Array:
    if sizes is None:
        return fp8_gemm(q, scale, w_q, w_scale, out_dtype=dtype, backend=backend)
    return fp8_grouped_gemm(q, scale, w_q, w_scale, sizes, out_dtype=dtype, backend=backend)


_linear.defvjp(_forward, _backward)
