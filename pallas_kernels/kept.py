"""Which results of the forward pass are worth keeping where a layer is computed again.

DeepSeek-V3 computes its norms, up-projections and SwiGLU again in the backward pass (report,
section 3.2.3). What the rest of a layer needs bears a name, which a policy of `jax.checkpoint` can
ask for: `jax.checkpoint_policies.save_only_these_names(KEPT)`.

A policy that keeps more than names finds FP8 values, and `jax.checkpoint` rounds what it keeps by
`jax.lax.reduce_precision`, for which e4m3 has infinities: 256 and more would be kept as NaN. So the
rules of FP8 layers hand `as_bits` from forward to backward.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.checks import E4M3

KEPT = "kept"


def kept(tree: Any) -> Any:
    """The same arrays, named."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), tree)


def as_bits(tree: Any) -> Any:
    """The same arrays, of e4m3 their bits; there are no other arrays of uint8 among them."""
    return jax.tree.map(lambda x: _cast(x, E4M3, jnp.uint8), tree)


def from_bits(tree: Any) -> Any:
    """What `as_bits` was given."""
    return jax.tree.map(lambda x: _cast(x, jnp.uint8, E4M3), tree)


def _cast(x: Any, old: Any, new: Any) -> Any:
    return jax.lax.bitcast_convert_type(x, new) if x.dtype == old else x
