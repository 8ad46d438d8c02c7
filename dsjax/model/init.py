"""How parameters start: normal with V3's constant deviation, norms at one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> nnx.Param:
    """V3 draws every weight with deviation 0.006 (section 4.2), whatever its fan-in."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape)).astype(dtype))


def ones(width: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param(jnp.ones((width,), dtype))
