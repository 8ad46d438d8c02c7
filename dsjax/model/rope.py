"""Rotary positions with YaRN, in MLA's interleaved form: pairs (x[2i], x[2i+1])."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Model, Yarn


def _mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature (its equation 22 with DeepSeek's weight)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def softmax_scale(config: Model) -> float:
    """Width of a query to the -1/2, times YaRN's mscale squared."""
    yarn = config.yarn
    if yarn is None or not yarn.mscale_all_dim:
        return config.qk_dim**-0.5
    return config.qk_dim**-0.5 * _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def inverse_frequencies(config: Model) -> Float[np.ndarray, " r/2"]:
    """Angle of one step of position for each pair, slowed down by YaRN where it applies."""
    r = config.qk_rope_dim
    freq = config.rope_theta ** (-np.arange(0, r, 2, dtype=np.float64) / r)
    if config.yarn is None:
        return freq
    ramp = _yarn_ramp(config.yarn, r, config.rope_theta)
    return freq / config.yarn.factor * ramp + freq * (1 - ramp)


def _yarn_ramp(yarn: Yarn, r: int, theta: float) -> Float[np.ndarray, " r/2"]:
    """0 for pairs that turn often within the original context (kept), 1 for slow ones."""

    def pair_with(turns: float) -> float:
        return r * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), r - 1)
    width = max(high - low, 0.001)
    return np.clip((np.arange(r // 2) - low) / width, 0, 1)


def _magnitude(yarn: Yarn | None) -> float:
    """Length given to the rotated vectors; 1 whenever both mscales are equal."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def rotation(config: Model, positions: Int[Array, "b t"]) -> Float[Array, "b t r/2 2"]:
    """Cosine and sine of every pair's angle at the given positions, in float32."""
    freq = jnp.asarray(inverse_frequencies(config), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * freq
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1) * _magnitude(config.yarn)


def rotate(
    x: Float[Array, "b t *h r"], turn: Float[Array, "b t r/2 2"]
) -> Float[Array, "b t *h r"]:
    """Turn each pair of x by its angle; heads, if there are any, share the angles."""
    if x.ndim == 4:
        turn = turn[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd, cos, sin = pairs[..., 0], pairs[..., 1], turn[..., 0], turn[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
