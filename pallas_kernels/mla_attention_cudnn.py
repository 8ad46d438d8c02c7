"""cuDNN's flash attention, for GPUs and widths that `mla_attention` has no kernel for.

It wants keys and values of equal widths, so the values are filled up with zeros, and whole keys for
every head. JAX's door to it rounds the logarithms of the sums to the values' dtype: they are not
asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import device

if TYPE_CHECKING:
    from jaxtyping import Array, Float

WIDTHS = {9.0: 256, 8.0: 128}
"""Widest heads of cuDNN's forward and backward, by the least compute capability."""


def takes(q: Float[Array, "b t h q"], v: Float[Array, "b s h v"]) -> bool:
    """Whether this process's GPU attends with such heads, forward and backward."""
    wide, narrow = q.shape[-1], v.shape[-1]
    card = device.compute_capability()
    limit = next((width for least, width in WIDTHS.items() if card >= least), 0)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and narrow <= wide <= limit and wide % 8 == 0


def attend_causally(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b t h n"],
    k_rope: Float[Array, "b t r"] | None,
    v: Float[Array, "b t h v"],
    *,
    scale: float,
) -> Float[Array, "b t h v"]:
    """Attention of every token to itself and those before it, differentiable."""
    if k_rope is not None:
        copies = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]))
        k = jnp.concatenate([k, copies], axis=-1)
    filled = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1])))
    out = jax.nn.dot_product_attention(
        q, k, filled, is_causal=True, scale=scale, implementation="cudnn"
    )
    return out[..., : v.shape[-1]]
