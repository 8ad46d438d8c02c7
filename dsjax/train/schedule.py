"""What changes over a run: learning rate, MTP weight, speed of the router bias (V3 section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import optax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Balance, Mtp, Optimizer


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up, constant, cosine, constant, and a last lower constant."""
    warmup = round(config.warmup_fraction * steps)
    constant = round(config.constant_fraction * steps)
    cosine = max(round(config.cosine_fraction * steps), 1)
    last = steps - round(config.last_fraction * steps)
    ramp = optax.linear_schedule(
        config.peak_lr / max(warmup, 1), config.peak_lr, max(warmup - 1, 1)
    )
    decay = optax.cosine_decay_schedule(config.peak_lr, cosine, config.final_lr / config.peak_lr)
    pieces = [ramp, optax.constant_schedule(config.peak_lr), decay]
    boundaries = [warmup, warmup + constant]
    if last < steps:
        pieces.append(optax.constant_schedule(config.last_lr))
        boundaries.append(max(last, warmup + constant + 1))
    return optax.join_schedules(pieces, boundaries)


def bias_speed(config: Balance, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """How far each router bias moves in this step."""
    return jnp.where(step < config.bias_until * steps, config.bias_speed, 0.0)


def mtp_weight(config: Mtp, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
    """Weight lambda of the multi-token-prediction loss in this step."""
    return jnp.where(step < config.late_from * steps, config.weight, config.late_weight)
