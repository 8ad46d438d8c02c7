"""Grouped matmul: rows sorted by group, each group times its own matrix.

* `ragged_dot` is XLA's own and the oracle; its CPU and GPU lowerings multiply every row with every
  matrix (12 TFLOP/s of useful work on an H200 at V2-Lite's shapes);
* `blocks` pads each group to whole blocks and does one batched matmul over them: any device;
* `mosaic_gpu` are our kernels for Hopper, bf16 only, with a third for the weight gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import sm90_gemm
from pallas_kernels.device import is_gpu, is_hopper, require_hopper

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

BACKENDS = ("auto", "mosaic_gpu", "blocks", "ragged_dot")
CPU_BLOCK, GPU_BLOCK = 64, 512


def grouped_gemm(
    x: Float[Array, "m k"],
    w: Float[Array, "g k n"],
    group_sizes: Int[Array, " g"],
    *,
    backend: Literal["auto", "mosaic_gpu", "blocks", "ragged_dot"] = "auto",
) -> Float[Array, "m n"]:
    """`x[rows of group i] @ w[i]` for every group; differentiable in x and w.

    Groups may be empty. The sizes add up to m at most; rows behind their sum take part in nothing,
    whatever they hold, and are unspecified in results and gradients. Raises ValueError on shapes or
    a backend that do not fit.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.shape}: expected [m, k] and [groups, k, n]")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"group_sizes {group_sizes.shape}: expected one size for each of {w.shape[0]} groups"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "mosaic_gpu" if is_hopper() and _mosaic_takes(x, w) else "blocks"
    if backend == "mosaic_gpu" and not _mosaic_takes(x, w):
        raise ValueError(
            f"mosaic_gpu takes bf16 and arrays that are not empty; got x {x.dtype} {x.shape}, "
            f"w {w.dtype} {w.shape}"
        )
    if backend == "mosaic_gpu":
        require_hopper(backend)
    return {"mosaic_gpu": _mosaic, "blocks": _blocks, "ragged_dot": _ragged_dot}[backend](
        x, w, group_sizes
    )


def _exact(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x, w, sizes, precision=_exact(x))


def _blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    (m, k), (groups, _, n) = x.shape, w.shape
    if m == 0:
        return jnp.zeros((0, n), x.dtype)
    rows = min(GPU_BLOCK if is_gpu() else CPU_BLOCK, m)
    count = -(-m // rows) + groups
    blocks = -(-sizes // rows)
    block_end, end = jnp.cumsum(blocks), jnp.cumsum(sizes)
    group = jnp.minimum(jnp.searchsorted(end, jnp.arange(m), side="right"), groups - 1)
    slot = jnp.arange(m) - (end - sizes)[group] + (block_end - blocks)[group] * rows
    slot = jnp.where(jnp.arange(m) < end[-1], slot, count * rows + jnp.arange(m))
    owner = jnp.minimum(jnp.searchsorted(block_end, jnp.arange(count), side="right"), groups - 1)
    padded = jnp.zeros((count * rows, k), x.dtype).at[slot].set(x, unique_indices=True, mode="drop")
    out = jnp.einsum(
        "amk,akn->amn", padded.reshape(count, rows, k), _for_blocks(w, owner), precision=_exact(x)
    )
    return out.reshape(count * rows, n).at[slot].get(unique_indices=True, mode="fill", fill_value=0)


@jax.custom_vjp
def _for_blocks(w: jax.Array, owner: jax.Array) -> jax.Array:
    """Every block's matrix. Gradients of a group's blocks are added up by a product: in float32,
    and, unlike in memory, in the same order each time."""
    return w[owner]


def _for_blocks_bwd(saved: tuple, grad: jax.Array) -> tuple[jax.Array, None]:
    w, owner = saved
    of_group = (jnp.arange(len(w))[:, None] == owner).astype(grad.dtype)
    summed = jnp.einsum(
        "ga,akn->gkn", of_group, grad, precision=_exact(grad),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return summed.astype(grad.dtype), None


_for_blocks.defvjp(lambda w, owner: (_for_blocks(w, owner), (w, owner)), _for_blocks_bwd)


def _mosaic_takes(x: jax.Array, w: jax.Array) -> bool:
    return x.dtype == w.dtype == jnp.bfloat16 and x.size > 0 and w.size > 0


@jax.custom_vjp
def _mosaic(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return sm90_gemm.bf16_grouped_by_k(x, w, sizes, x.dtype)


def _mosaic_fwd(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple]:
    return _mosaic(x, w, sizes), (x, w, sizes)


def _mosaic_bwd(saved: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, np.ndarray]:
    x, w, sizes = saved
    d_x = sm90_gemm.bf16_grouped(grad, w, sizes, x.dtype)
    d_w = sm90_gemm.bf16_grouped_wgrad(x, grad, sizes, w.dtype)
    return d_x, d_w, np.zeros(sizes.shape, jax.dtypes.float0)


_mosaic.defvjp(_mosaic_fwd, _mosaic_bwd)
