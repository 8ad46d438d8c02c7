"""Paged decode in float32, a few requests at a time: what the kernels are held to."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.latent_cache import LATENT, PAGE, dequantize_latent_cache

EXACT = lax.Precision.HIGHEST
MOST_GATHERED = 1 << 23  # numbers of tokens that are held at a time


def decode(
    q: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array, *, scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """(out [b, s, h, 512], lse [b, s, h]) of q [b, s, h, 576], as `mla_decode` says."""
    request = functools.partial(_request, cache, scale=scale, causal=causal)
    together = max(1, MOST_GATHERED // (table.shape[1] * PAGE * q.shape[-1]))
    return lax.map(lambda one: request(*one), (q, table, lengths), batch_size=together)


def _request(
    cache: jax.Array, q: jax.Array, pages: jax.Array, length: jax.Array, *, scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of q [s, h, 576] and the pages' numbers; out [s, h, 512] and lse [s, h]."""
    s = q.shape[0]
    keys = _tokens(cache, pages, length)
    hidden = s - 1 - jnp.arange(s) if causal else jnp.zeros(s, jnp.int32)
    seen = jnp.arange(keys.shape[0]) < (length - hidden)[:, None, None]
    scores = jnp.einsum("shw,kw->shk", q.astype(jnp.float32), keys, precision=EXACT) * scale
    scores = jnp.where(seen, scores, -jnp.inf)
    some = seen.any(axis=-1)
    most = jnp.where(some, scores.max(axis=-1), 0)
    weights = jnp.exp(scores - most[..., None])
    total = jnp.where(some, weights.sum(axis=-1), 1)
    out = jnp.einsum("shk,kc->shc", weights, keys[:, :LATENT], precision=EXACT)
    lse = jnp.where(some, most + jnp.log(total), jnp.inf)
    return (out / total[..., None]).astype(q.dtype), lse


def _tokens(cache: jax.Array, pages: jax.Array, length: jax.Array) -> jax.Array:
    """float32 [max_pages * 64, 576], zeros behind the length: a weight of 0 does not undo NaN."""
    found = jnp.take(cache, pages, axis=0, mode="clip")
    if cache.dtype == jnp.uint8:
        found = dequantize_latent_cache(found)
    found = found.reshape(pages.shape[0] * PAGE, -1)
    inside = jnp.arange(found.shape[0]) < length
    return jnp.where(inside[:, None], found, 0).astype(jnp.float32)
