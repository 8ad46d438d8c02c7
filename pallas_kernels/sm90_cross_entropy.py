"""Nats and their gradient out of tiles of powers: `sm90_bf16_gemm_softmax`, and XLA behind it.

A logit's gradient is its power times a factor of its row and tile, so that no further exponential
is taken and no logit read; the target's is made from its nats, as 1 - p would lose a small rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sm90_bf16_gemm_softmax import BLOCK, TILE, Powers, bf16_gemm_softmax
from pallas_kernels.sm90_tiles import SMS

ROWS = 8  # TMA's unit


def fits(hidden: jax.Array, head: jax.Array) -> bool:
    """Whether the kernel takes hidden [..., d] and head [d, p]."""
    d, p = head.shape
    return hidden.dtype == jnp.bfloat16 and d % BLOCK == 0 and p % TILE.width == 0


def score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, interpret: Any = None
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Nats [b, t] of bfloat16 hidden [b, t, d] and head [d, p]; and a function of weights [b, t]
    to bfloat16 [b, t, p], the gradient of their weighted sum with respect to the logits. Targets
    outside [0, p) leave their nats unspecified."""
    (b, t, d), p = hidden.shape, head.shape[1]
    filled = ((0, -(b * t) % ROWS), (0, 0))
    rows = jnp.pad(hidden.reshape(b * t, d), filled)
    columns = jnp.pad(targets.reshape(b * t).astype(jnp.int32), filled[0])
    found = bf16_gemm_softmax(rows, head, columns, sms=SMS, interpret=interpret)
    nats, share = combine(found)

    def gradient(weights: jax.Array) -> jax.Array:
        each = jnp.pad(weights.reshape(b * t), filled[0])
        return d_logits(found.powers, share, nats, columns, each)[: b * t].reshape(b, t, p)

    return nats[: b * t].reshape(b, t), gradient


def combine(found: Powers) -> tuple[jax.Array, jax.Array]:
    """Nats [M], and [tiles, M] what a power counts for in its row's softmax."""
    top = found.most.max(axis=0)
    by = jnp.exp2(found.most - top)
    total = (found.sums * by).sum(axis=0)
    return (top + jnp.log2(total)) * math.log(2) - found.hits, by / total


def d_logits(
    powers: jax.Array, share: jax.Array, nats: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """[M, p]: weights * (softmax - one for the target)."""
    (m, p), tiles = powers.shape, share.shape[0]
    tiled = powers.reshape(m, tiles, p // tiles)
    rest = tiled * (share * weights).T[..., None]
    column = jnp.arange(p, dtype=jnp.int32).reshape(tiles, -1)
    at_target = (weights * jnp.expm1(-nats))[:, None, None]
    found = jnp.where(column == targets[:, None, None], at_target, rest)
    return found.astype(powers.dtype).reshape(m, p)
