"""AdamW as DeepSeek-V3 runs it: fp32 master weights, moments in float32 or bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsjax.train.schedule import learning_rate

if TYPE_CHECKING:
    from jaxtyping import Array, Int, PyTree

    from dsjax.config import Optimizer


class AdamState(NamedTuple):
    count: Int[Array, ""]
    mu: PyTree[Array]
    nu: PyTree[Array]


def scale_by_adam(
    b1: float, b2: float, eps: float, moment_dtype: str
) -> optax.GradientTransformation:
    """Adam's direction with both moments stored in `moment_dtype` and computed in float32."""
    dtype = jnp.dtype(moment_dtype)

    def init(params: PyTree) -> AdamState:
        def zeros() -> PyTree:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

        return AdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, AdamState]:
        del params
        count = state.count + 1
        wide = jax.tree.map(lambda m: m.astype(jnp.float32), (state.mu, state.nu))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, wide[0], updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, wide[1], updates)
        fix_1, fix_2 = 1 - b1**count, 1 - b2**count
        steps = jax.tree.map(lambda m, v: m / fix_1 / (jnp.sqrt(v / fix_2) + eps), mu, nu)
        mu, nu = jax.tree.map(lambda m: m.astype(dtype), (mu, nu))
        return steps, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def is_decayed(path: tuple) -> bool:
    """Norm weights are not decayed, everything else is."""
    names = [str(getattr(key, "key", "")) for key in path]
    return not any(name.endswith("norm") for name in names)


def build_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm, Adam, decoupled weight decay, scheduled learning rate."""

    def decayed(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.b1, config.b2, config.eps, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
