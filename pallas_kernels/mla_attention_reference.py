"""Attention whose queries each see one interval of keys: the jnp reference, forward and backward.

Queries are taken in blocks and the backward pass makes the weights anew from the logarithms of
their sums, so that no array of queries x keys outlives a block. All sums and products are float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

BLOCK = 512  # queries
_einsum = functools.partial(
    jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


@functools.partial(jax.jit, static_argnames="scale")
def forward(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b s h n"],
    k_rope: Float[Array, "b s r"] | None,
    v: Float[Array, "b s h v"],
    low: Int32[Array, "b t"],
    high: Int32[Array, "b t"],
    *,
    scale: float,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """(out of q's dtype, lse float32); query i of a batch row sees keys [low_i, high_i).

    The keys' last r columns are k_rope, the same for all heads, if it is given. A query that sees
    no key gets 0 and +inf.
    """
    keys, values = _wide(k, k_rope), v.astype(jnp.float32)

    def block(queries: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = _scores(queries.astype(jnp.float32), keys, low, high, scale)
        most = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1)
        none = total == 0
        out = _einsum("bhij,bjhv->bihv", weights, values)
        out = out / jnp.where(none, 1, total).swapaxes(1, 2)[..., None]
        return out.astype(q.dtype), jnp.where(none, jnp.inf, most[..., 0] + jnp.log(total))

    out, lse = lax.map(lambda x: block(*x), [_cut(x) for x in (q, low, high)])
    return _joined(out, q.shape[1]), _joined(lse.swapaxes(2, 3), q.shape[1]).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames="scale")
def backward(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b s h n"],
    k_rope: Float[Array, "b s r"] | None,
    v: Float[Array, "b s h v"],
    low: Int32[Array, "b t"],
    high: Int32[Array, "b t"],
    out: Float[Array, "b t h v"],
    lse: Float[Array, "b h t"],
    d_out: Float[Array, "b t h v"],
    d_lse: Float[Array, "b h t"] | None = None,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """(d_q, d_k, d_k_rope, d_v), each of its argument's dtype, of what `forward` took and gave.

    With P the weights, dP = d_out V^T and delta = sum(out * d_out) - d_lse for each query:
    dV = P^T d_out, dS = P (dP - delta) scale, dQ = dS K, dK = dS^T Q.
    """
    keys, values = _wide(k, k_rope), v.astype(jnp.float32)
    delta = _einsum("bihv,bihv->bih", out, d_out)
    if d_lse is not None:
        delta -= d_lse.swapaxes(1, 2)

    def block(sums: tuple[jax.Array, jax.Array], x: list[jax.Array]) -> tuple:
        queries, low, high, lse, delta, d_out = x
        queries, d_out = queries.astype(jnp.float32), d_out.astype(jnp.float32)
        lse, delta = (row.swapaxes(1, 2)[..., None] for row in (lse, delta))
        weights = jnp.exp(_scores(queries, keys, low, high, scale) - lse)
        d_weights = _einsum("bihv,bjhv->bhij", d_out, values)
        d_scores = weights * (d_weights - delta) * scale
        d_keys = sums[0] + _einsum("bhij,bihq->bjhq", d_scores, queries)
        d_values = sums[1] + _einsum("bhij,bihv->bjhv", weights, d_out)
        return (d_keys, d_values), _einsum("bhij,bjhq->bihq", d_scores, keys).astype(q.dtype)

    rows = q, low, high, lse.swapaxes(1, 2), delta, d_out
    zeros = jnp.zeros_like(keys), jnp.zeros_like(values)
    (d_keys, d_values), d_q = lax.scan(block, zeros, [_cut(x) for x in rows])
    d_k, d_rope = jnp.split(d_keys, [k.shape[-1]], axis=-1)
    d_k_rope = None if k_rope is None else d_rope.sum(2).astype(k_rope.dtype)
    return _joined(d_q, q.shape[1]), d_k.astype(k.dtype), d_k_rope, d_values.astype(v.dtype)


def _wide(k: jax.Array, k_rope: jax.Array | None) -> jax.Array:
    """Whole keys of every head."""
    if k_rope is None:
        return k.astype(jnp.float32)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k, shared], axis=-1).astype(jnp.float32)


def _scores(
    queries: jax.Array, keys: jax.Array, low: jax.Array, high: jax.Array, scale: float
) -> jax.Array:
    scores = _einsum("bihq,bjhq->bhij", queries, keys) * scale
    key = jnp.arange(keys.shape[1])
    seen = (key >= low[..., None]) & (key < high[..., None])
    return jnp.where(seen[:, None], scores, -jnp.inf)


def _cut(x: jax.Array) -> jax.Array:
    """[b, t, ...] -> [blocks, b, block, ...], filled up with zeros: rows that see none."""
    size = min(BLOCK, x.shape[1])
    blocks = -(-x.shape[1] // size)
    ends = [(0, 0), (0, blocks * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, ends).reshape(x.shape[0], blocks, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: jax.Array, length: int) -> jax.Array:
    joined = x.swapaxes(0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]
