"""Our AdamW beside the one of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.config import Optimizer
from dsjax.train.optimizer import build_optimizer
from dsjax.train.schedule import learning_rate

CONFIG = Optimizer(peak_lr=1e-2, final_lr=1e-3, last_lr=1e-4, clip_norm=1.0, weight_decay=0.1)
STEPS = 20
SHAPES = {"embed": (6, 4), "attn_norm": (4,), "block": {"down": (4, 6), "norm": (6,)}}


def draw(seed: int, scale: float = 1.0) -> dict:
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.float32(scale * generator.standard_normal(shape)),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients(step: int) -> dict:
    """Every third one is too small to be clipped."""
    return draw(step + 1, 0.01 if step % 3 == 0 else 1.0)


def work(optimizer: optax.GradientTransformation) -> tuple[dict, object]:
    params = draw(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def reference() -> optax.GradientTransformation:
    decayed = {"embed": True, "attn_norm": False, "block": {"down": True, "norm": False}}
    return optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(
            learning_rate(CONFIG, STEPS),
            CONFIG.b1,
            CONFIG.b2,
            CONFIG.eps,
            weight_decay=CONFIG.weight_decay,
            mask=decayed,
        ),
    )


def adam_state(state: object) -> object:
    return next(part for part in state if hasattr(part, "mu"))


def test_float32_equals_optax_adamw_with_clipping_and_masked_decay():
    ours, expected = work(build_optimizer(CONFIG, STEPS))[0], work(reference())[0]
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=1e-7)


def test_decay_pulls_on_matrices_and_not_on_norms():
    optimizer, params = build_optimizer(CONFIG, STEPS), draw(0)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    pull = -float(learning_rate(CONFIG, STEPS)(0)) * CONFIG.weight_decay
    np.testing.assert_allclose(updates["embed"], pull * params["embed"], rtol=1e-6)
    np.testing.assert_allclose(updates["block"]["down"], pull * params["block"]["down"], rtol=1e-6)
    assert not updates["attn_norm"].any()
    assert not updates["block"]["norm"].any()


def test_bfloat16_moments_are_stored_in_16_bits_and_stay_close():
    config = Optimizer(**{**vars(CONFIG), "moment_dtype": "bfloat16"})
    params, state = work(build_optimizer(config, STEPS))
    exact, _ = work(build_optimizer(CONFIG, STEPS))
    moments = jax.tree.leaves((adam_state(state).mu, adam_state(state).nu))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    for start, left, right in zip(*map(jax.tree.leaves, (draw(0), params, exact)), strict=True):
        far = float(jnp.abs(right - start).max())
        assert 0 < float(jnp.abs(left - right).max()) < 0.05 * far


def test_float32_moments_by_default():
    moments = jax.tree.leaves(adam_state(build_optimizer(CONFIG, STEPS).init(draw(0)))[1:])
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("count", [0, 3, 19])
def test_learning_rate_is_the_schedule_at_the_count(count):
    params = {"attn_norm": jnp.ones(4)}
    optimizer = build_optimizer(CONFIG, STEPS)
    state = optimizer.init(params)
    for _ in range(count + 1):
        updates, state = optimizer.update({"attn_norm": jnp.ones(4)}, state, params)
    # A constant gradient makes Adam's direction one.
    np.testing.assert_allclose(
        updates["attn_norm"], -learning_rate(CONFIG, STEPS)(count), rtol=1e-4
    )
    assert int(adam_state(state).count) == count + 1
