"""MLA over the tokens that the indexer chose (DeepSeek-V3.2 report, section 2.1; FlashMLA's sparse
kernels): absorbed queries, one latent and rotary key for all heads, values its first 512 columns.

Each query brings the indices of its tokens. An index that names no token, -1 as a rule, is left out
wherever it stands, and an index that stands there twice counts twice in the softmax. Tokens that no
query asks for may hold anything, NaN too. Where a query has no token, its output is zero and its
lse, a natural logarithm, is +inf. The reference has gradients, for which it gathers tokens anew.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, gemm_backend
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.latent_cache import BYTES, LATENT, PAGE, WIDTH, dequantize_latent_cache

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float32, Int32, UInt8

    Cache = BFloat16[Array, "pages 64 576"] | UInt8[Array, "pages 64 656"]

MOST_GATHERED = 1 << 24  # numbers of tokens that the reference holds at a time
EXACT = lax.Precision.HIGHEST


def mla_sparse_decode(
    q: BFloat16[Array, "b t h 576"],
    cache: Cache,
    indices: Int32[Array, "b t k"],
    *,
    scale: float,
    backend: Backend = "auto",
) -> tuple[BFloat16[Array, "b t h 512"], Float32[Array, "b t h"]]:
    """(out, lse) of new tokens' queries and chosen tokens of a paged cache.

    q is bfloat16 [b, t, h, 576]; the cache bfloat16 [pages, 64, 576], or uint8 [pages, 64, 656] as
    `latent_cache` says, whose latents are rounded to bfloat16 before they are used; an index of
    [b, t, k] is page * 64 + row, and names no token outside 0 to pages * 64 - 1. scale multiplies
    the scores. out is bfloat16 [b, t, h, 512], lse float32 [b, t, h]. Raises ValueError on dtypes,
    shapes, a scale or a backend that do not fit.
    """
    checks.array("q", q, "[b, t, h, 576]", jnp.bfloat16)
    checks.array("cache", cache, "[pages, 64, 576 or 656]", jnp.bfloat16, jnp.uint8)
    width = BYTES if cache.dtype == jnp.uint8 else WIDTH
    checks.exact("cache", cache, (cache.shape[0], PAGE, width), cache.dtype)
    _check(q, indices, scale)
    if _takes_kernel(backend, q, cache, indices):
        from pallas_kernels import sm90_mla_sparse

        return sm90_mla_sparse.decode(q, cache, indices, scale=scale)
    b, t, h, _ = q.shape
    tokens = cache.reshape(cache.shape[0] * PAGE, width)
    chosen = indices.reshape(b * t, indices.shape[2])
    out, lse = _reference(q.reshape(b * t, h, WIDTH), tokens, chosen, scale)
    return out.reshape(b, t, h, LATENT), lse.reshape(b, t, h)


def mla_sparse_prefill(
    q: BFloat16[Array, "t h 576"],
    kv: BFloat16[Array, "s 576"],
    indices: Int32[Array, "t k"],
    *,
    scale: float,
    backend: Backend = "auto",
) -> tuple[BFloat16[Array, "t h 512"], Float32[Array, "t h"]]:
    """(out, lse) of a prompt's queries and chosen ones of its tokens.

    q is bfloat16 [t, h, 576], kv [s, 576]; an index of [t, k] names no token outside 0 to s - 1.
    The indices say all about causality. scale, out [t, h, 512], lse [t, h] and errors are as in
    `mla_sparse_decode`.
    """
    checks.array("q", q, "[t, h, 576]", jnp.bfloat16)
    checks.array("kv", kv, "[s, 576]", jnp.bfloat16)
    checks.exact("kv", kv, (kv.shape[0], WIDTH), jnp.bfloat16)
    _check(q, indices, scale)
    if _takes_kernel(backend, q, kv, indices):
        from pallas_kernels import sm90_mla_sparse

        return sm90_mla_sparse.prefill(q, kv, indices, scale=scale)
    return _reference(q, kv, indices, scale)


def _takes_kernel(backend: Backend, *operands: jax.Array) -> bool:
    return gemm_backend.takes_kernels(backend) and all(x.size for x in operands)


def _reference(
    q: jax.Array, tokens: jax.Array, indices: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Of q [t, h, 576], tokens [s, 576 or 656] and indices [t, k]: a few queries at a time."""
    t, h, _ = q.shape
    if not (q.size and tokens.size and indices.size):
        return jnp.zeros((t, h, LATENT), q.dtype), jnp.full((t, h), jnp.inf, jnp.float32)
    indices = jnp.pad(indices, ((0, 0), (0, -indices.shape[1] % PAGE)), constant_values=-1)
    attend = jax.checkpoint(functools.partial(_attend, tokens=tokens, scale=scale))
    together = max(1, MOST_GATHERED // (indices.shape[1] * WIDTH))
    return lax.map(lambda row: attend(*row), (q, indices), batch_size=together)


def _attend(
    q: jax.Array, indices: jax.Array, *, tokens: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """One query's heads [h, 576], float32 all along."""
    valid = (indices >= 0) & (indices < tokens.shape[0])
    chosen = jnp.take(tokens, jnp.where(valid, indices, 0), axis=0)
    if tokens.dtype == jnp.uint8:
        chosen = dequantize_latent_cache(chosen.reshape(-1, PAGE, BYTES)).reshape(-1, WIDTH)
    chosen = jnp.where(valid[:, None], chosen, 0).astype(jnp.float32)
    scores = jnp.einsum("hw,kw->hk", q.astype(jnp.float32), chosen, precision=EXACT) * scale
    some = valid.any()
    most = jnp.where(some, jnp.max(jnp.where(valid, scores, -jnp.inf), axis=1), 0)
    weights = jnp.where(valid, jnp.exp(scores - most[:, None]), 0)
    total = jnp.where(some, weights.sum(axis=1), 1)
    out = jnp.einsum("hk,kc->hc", weights, chosen[:, :LATENT], precision=EXACT) / total[:, None]
    return out.astype(q.dtype), jnp.where(some, most + jnp.log(total), jnp.inf)


def _check(q: jax.Array, indices: jax.Array, scale: float) -> None:
    checks.exact("q", q, (*q.shape[:-1], WIDTH), jnp.bfloat16)
    checks.array("indices", indices, "[..., k]", jnp.int32)
    checks.exact("indices", indices, (*q.shape[:-2], *indices.shape[-1:]), jnp.int32)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}: expected a finite number above 0")
