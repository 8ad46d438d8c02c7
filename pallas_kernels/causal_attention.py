"""Causal attention whose keys are wider than its values (MLA: 192 and 128).

* `reference` works through the queries in blocks and recomputes the scores in the backward pass,
  so that no t x t array outlives a block;
* `cudnn` is cuDNN's flash attention; it wants equal widths, so the values are padded with zeros.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.device import compute_capability

if TYPE_CHECKING:
    from jaxtyping import Array, Float

QUERY_BLOCK = 512
CUDNN_WIDTHS = {9.0: 256, 8.0: 128}
"""Widest heads of cuDNN's forward and backward, by the least compute capability."""


def causal_attention(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b t h q"],
    v: Float[Array, "b t h v"],
    *,
    scale: float,
    backend: Literal["auto", "cudnn", "reference"] = "auto",
) -> Float[Array, "b t h v"]:
    """Attention of every token to itself and those before it; softmax in float32.

    Raises ValueError when the shapes do not belong together or the backend is unknown.
    """
    if q.shape != k.shape or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} differ in more than the width")
    if backend not in ("auto", "cudnn", "reference"):
        raise ValueError(f"backend is {backend!r}: use auto, cudnn or reference")
    if backend == "auto":
        backend = "cudnn" if _cudnn_takes(q, v) else "reference"
    return (_cudnn if backend == "cudnn" else _reference)(q, k, v, scale)


def _cudnn_takes(q: Float[Array, "b t h q"], v: Float[Array, "b t h v"]) -> bool:
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    widest = max(q.shape[-1], v.shape[-1])
    card = compute_capability()
    limit = next((width for least, width in CUDNN_WIDTHS.items() if card >= least), 0)
    return half and q.shape[-1] >= v.shape[-1] and widest <= limit and widest % 8 == 0


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    padding = q.shape[-1] - v.shape[-1]
    wide = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, padding)))
    out = jax.nn.dot_product_attention(
        q, k, wide, is_causal=True, scale=scale, implementation="cudnn"
    )
    return out[..., : v.shape[-1]]


def _reference(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    b, t, h, width = q.shape
    if t <= QUERY_BLOCK:
        return _attend(q, k, v, jnp.arange(t), scale)
    blocks = -(-t // QUERY_BLOCK)
    padded = jnp.pad(q, ((0, 0), (0, blocks * QUERY_BLOCK - t), (0, 0), (0, 0)))
    q_blocks = padded.reshape(b, blocks, QUERY_BLOCK, h, width).swapaxes(0, 1)
    rows = jnp.arange(blocks * QUERY_BLOCK).reshape(blocks, QUERY_BLOCK)
    attend = jax.checkpoint(functools.partial(_attend, scale=scale))
    out = jax.lax.map(lambda block: attend(block[0], k, v, block[1]), (q_blocks, rows))
    return out.swapaxes(0, 1).reshape(b, blocks * QUERY_BLOCK, h, -1)[:, :t]


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, scale: float) -> jax.Array:
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    scores = (
        jnp.einsum("bihq,bjhq->bhij", q, k, precision=exact, preferred_element_type=jnp.float32)
        * scale
    )
    visible = rows[:, None] >= jnp.arange(k.shape[1])[None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhij,bjhv->bihv", weights.astype(v.dtype), v, precision=exact)
