"""Routed experts against a loop over tokens: nothing is dropped, nothing mixed up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.model.moe import Moe, routed_experts, swiglu
from tests.tiny import CONFIG, randomise

TOKENS, EXPERTS, DIM, HIDDEN = 14, 5, 8, 6
ROUTINGS = {
    "spread": [[t % 5, (t * 3 + 1) % 5] if t % 5 != 2 else [2, 4] for t in range(TOKENS)],
    "experts without tokens": [[1, 3] if t % 3 else [3, 1] for t in range(TOKENS)],
    "all on the first and the last": [[4, 0]] * TOKENS,
    "all on one": [[2]] * TOKENS,
}


def arrays(routing: list) -> tuple:
    keys = jax.random.split(jax.random.key(0), 5)
    k = len(routing[0])
    x = jax.random.normal(keys[0], (TOKENS, DIM))
    weights = jax.random.uniform(keys[1], (TOKENS, k), minval=0.1)
    gate_up = 0.5 * jax.random.normal(keys[2], (EXPERTS, DIM, 2 * HIDDEN))
    down = 0.5 * jax.random.normal(keys[3], (EXPERTS, HIDDEN, DIM))
    return x, weights, gate_up, down, jax.random.normal(keys[4], (TOKENS, DIM))


def by_loop(x, weights, gate_up, down, pull, routing) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output and, for the loss sum(output * pull), gradients, a token and expert at a time."""
    x, weights, gate_up, down, pull = (
        np.asarray(a, np.float64) for a in (x, weights, gate_up, down, pull)
    )
    out = np.zeros_like(x)
    dx, dw, dgu, dd = (np.zeros_like(a) for a in (x, weights, gate_up, down))
    for t, experts in enumerate(routing):
        for j, e in enumerate(experts):
            gate, up = np.split(x[t] @ gate_up[e], 2)
            sigmoid = 1 / (1 + np.exp(-gate))
            hidden = gate * sigmoid * up
            out[t] += weights[t, j] * (hidden @ down[e])
            dw[t, j] = pull[t] @ (hidden @ down[e])
            dd[e] += weights[t, j] * np.outer(hidden, pull[t])
            dh = weights[t, j] * (down[e] @ pull[t])
            silu_slope = sigmoid * (1 + gate * (1 - sigmoid))
            dboth = np.concatenate([dh * up * silu_slope, dh * gate * sigmoid])
            dgu[e] += np.outer(x[t], dboth)
            dx[t] += gate_up[e] @ dboth
    return out, [dx, dw, dgu, dd]


@jax.jit
def value_and_grads(x, weights, gate_up, down, pull, experts):
    def loss(x, weights, gate_up, down):
        out = routed_experts(x, experts, weights, gate_up, down)
        return (out * pull).sum(), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x, weights, gate_up, down)
    return out, grads


@pytest.mark.parametrize("case", ROUTINGS)
def test_values_and_gradients_equal_the_loop(case):
    inputs = arrays(ROUTINGS[case])
    out, grads = value_and_grads(*inputs, jnp.asarray(ROUTINGS[case]))
    expected, expected_grads = by_loop(*inputs, ROUTINGS[case])
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_token_gets_the_same_result_whoever_else_is_there():
    x, weights, gate_up, down, pull = arrays(ROUTINGS["spread"])
    experts = jnp.asarray(ROUTINGS["spread"])
    crowded, _ = value_and_grads(x, weights, gate_up, down, pull, experts.at[1:].set(experts[0]))
    spread, _ = value_and_grads(x, weights, gate_up, down, pull, experts)
    np.testing.assert_allclose(crowded[0], spread[0], atol=1e-6)


def test_choices_may_come_in_any_order():
    x, weights, gate_up, down, pull = arrays(ROUTINGS["spread"])
    experts = jnp.asarray(ROUTINGS["spread"])
    plain, _ = value_and_grads(x, weights, gate_up, down, pull, experts)
    turned, _ = value_and_grads(x, weights[:, ::-1], gate_up, down, pull, experts[:, ::-1])
    np.testing.assert_allclose(turned, plain, atol=1e-6)


def test_swiglu_takes_the_gate_first():
    gate, up = np.array([1.0, -2.0]), np.array([3.0, 5.0])
    found = swiglu(jnp.asarray(np.concatenate([gate, up])))
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, rtol=1e-6)


def test_layer_adds_shared_experts_and_reports_its_load():
    moe = randomise(
        nnx.eval_shape(lambda: Moe(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float32")))
    )
    x = jax.random.normal(jax.random.key(5), (2, 7, CONFIG.dim))
    out, stats = jax.jit(lambda moe, x: moe(x))(moe, x)
    rows = np.asarray(x, np.float64).reshape(14, -1)
    routing = jax.jit(lambda router, x: router(x))(moe.router, x.reshape(14, -1))
    expected, _ = by_loop(rows, routing.weights_TK, moe.experts.gate_up[...],
                          moe.experts.down[...], rows, routing.experts_TK.tolist())  # fmt: skip
    gate, up = np.split(rows @ np.asarray(moe.shared.gate_up[...], np.float64), 2, axis=1)
    shared = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(moe.shared.down[...], np.float64)
    np.testing.assert_allclose(out.reshape(14, -1), expected + shared, atol=3e-5)
    assert stats.load_E.sum() == 14 * CONFIG.top_k


def test_bfloat16_tokens_meet_bfloat16_experts_and_stay_so():
    x, weights, gate_up, down, _ = arrays(ROUTINGS["spread"])
    experts = jnp.asarray(ROUTINGS["spread"])
    out = jax.jit(routed_experts)(x.astype(jnp.bfloat16), experts, weights, gate_up, down)
    exact, _ = by_loop(x, weights, gate_up, down, x, ROUTINGS["spread"])
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out, np.float64) - exact).max() < 0.03 * np.abs(exact).max()
