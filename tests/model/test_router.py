"""Routing against loops in plain Python."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Model
from dsjax.model.router import Router, Routing, gate_weights, router_stats, select_experts
from tests.tiny import CONFIG, randomise

TOKENS = 200
CONFIGS = {
    "greedy": replace(CONFIG, selection="greedy", gate="softmax", top_k=3),
    "best group member": replace(CONFIG, selection="group_limited_greedy", gate="softmax"),
    "best group members, 3 of 4": replace(
        CONFIG, experts=12, top_groups=3, top_k=5, selection="group_limited_greedy"
    ),
    "noaux_tc": CONFIG,
    "noaux_tc, every expert of one group": replace(CONFIG, groups=2, top_groups=1, top_k=4),
    "noaux_tc, 2 of 3 groups": replace(CONFIG, experts=12, groups=3, top_groups=2, top_k=4),
    "noaux_tc, one group": replace(CONFIG, groups=1, top_groups=1, top_k=3),
}
BIASES = {"none": (0.0, 0.0), "around zero": (0.0, 0.3), "below every affinity": (-2.0, 0.3)}

select = jax.jit(select_experts, static_argnums=2)
weigh = jax.jit(gate_weights, static_argnums=2)
stats_of = jax.jit(router_stats, static_argnums=1)


def affinities(config: Model, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((TOKENS, config.experts))
    if config.gate == "sigmoid":
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    raised = np.exp(logits)
    return (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)


def bias_of(config: Model, kind: str) -> np.ndarray:
    mean, spread = BIASES[kind]
    drawn = np.random.default_rng(1).standard_normal(config.experts)
    return (mean + spread * drawn).astype(np.float32)


def chosen_by_loop(scores: np.ndarray, bias: np.ndarray, config: Model) -> set[int]:
    size, experts = config.experts // config.groups, range(config.experts)
    value = [float(s + b) if config.selection == "noaux_tc" else float(s)
             for s, b in zip(scores, bias, strict=True)]  # fmt: skip
    if config.selection != "greedy":
        judges = 2 if config.selection == "noaux_tc" else 1
        strength = {
            group: sum(sorted(value[group * size : (group + 1) * size])[-judges:])
            for group in range(config.groups)
        }
        kept = sorted(strength, key=strength.get)[-config.top_groups :]
        experts = [expert for expert in experts if expert // size in kept]
    return set(sorted(experts, key=lambda expert: value[expert])[-config.top_k :])


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("case", CONFIGS)
def test_selection_equals_the_loop(case, bias):
    config = CONFIGS[case]
    scores, bias = affinities(config), bias_of(config, bias)
    found = np.asarray(select(jnp.asarray(scores), jnp.asarray(bias), config))
    assert found.shape == (TOKENS, config.top_k)
    for row, token in zip(found, scores, strict=True):
        assert set(row.tolist()) == chosen_by_loop(token, bias, config)


@pytest.mark.parametrize("bias", BIASES)
def test_no_token_reaches_more_groups_than_allowed(bias):
    config = replace(CONFIG, experts=16, groups=8, top_groups=3, top_k=6)
    found = select(jnp.asarray(affinities(config)), jnp.asarray(bias_of(config, bias)),
                           config)  # fmt: skip
    groups = np.asarray(found) // 2
    assert max(len(set(row)) for row in groups.tolist()) == 3


def test_losing_groups_are_out_even_if_all_that_is_kept_is_negative():
    config = replace(CONFIG, groups=2, top_groups=1, top_k=4)
    scores = jnp.array([[0.5, 0.5, 0.5, 0.5, 0.9, 0.8, 0.1, 0.1]])
    bias = jnp.full((8,), -3.0)
    assert set(select(scores, bias, config)[0].tolist()) == {4, 5, 6, 7}


def test_bias_has_no_say_in_v2s_selections():
    for selection in ("greedy", "group_limited_greedy"):
        config = replace(CONFIG, selection=selection)
        scores = jnp.asarray(affinities(config))
        plain = select(scores, jnp.zeros(8), config)
        np.testing.assert_array_equal(select(scores, jnp.arange(8.0), config), plain)


def router(config: Model, bias: np.ndarray | None = None) -> Router:
    drawn = randomise(
        nnx.eval_shape(lambda: Router(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype("float32")))
    )
    if bias is not None:
        drawn.bias[...] = jnp.asarray(bias)
    return drawn


def tokens() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (TOKENS, CONFIG.dim))


@jax.jit
def route(module: Router, x: jax.Array) -> Routing:
    return module(x)


def test_bias_changes_the_selection_but_never_the_weights():
    pushed = np.array([5, 5, 0, 0, 5, 5, 0, 0], np.float32)
    plain, biased = (route(router(CONFIG, b), tokens()) for b in (np.zeros(8), pushed))
    assert set(np.unique(biased.experts_TK)) == {0, 1, 4, 5}
    assert set(np.unique(plain.experts_TK)) == set(range(8))
    np.testing.assert_array_equal(biased.scores_TE, plain.scores_TE)
    chosen = np.take_along_axis(np.asarray(plain.scores_TE), np.asarray(biased.experts_TK), axis=1)
    expected = CONFIG.route_scale * chosen / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(biased.weights_TK, expected, rtol=1e-5)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_affinities_are_float64s_of_the_logits(gate):
    module = router(replace(CONFIG, gate=gate))
    logits = np.asarray(tokens(), np.float64) @ np.asarray(module.weight[...], np.float64)
    raised = np.exp(logits)
    expected = raised / raised.sum(1, keepdims=True) if gate == "softmax" else raised / (1 + raised)
    np.testing.assert_allclose(route(module, tokens()).scores_TE, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("norm_topk", "route_scale"), [(True, 1.0), (True, 2.5), (False, 16.0)])
def test_weights_are_normalised_if_the_model_does_so_and_scaled(norm_topk, route_scale):
    config = replace(CONFIG, norm_topk=norm_topk, route_scale=route_scale)
    scores = affinities(config)
    experts = np.argsort(scores, axis=1)[:, ::-1][:, :2]
    found = weigh(jnp.asarray(scores), jnp.asarray(experts), config)
    chosen = np.take_along_axis(scores, experts, axis=1)
    expected = chosen / chosen.sum(axis=1, keepdims=True) if norm_topk else chosen
    np.testing.assert_allclose(found, route_scale * expected, rtol=1e-5)


@pytest.mark.parametrize(("gate", "size"), [("softmax", 300.0), ("sigmoid", 300.0)])
def test_all_logits_far_below_zero_give_no_nan(gate, size):
    module = router(replace(CONFIG, gate=gate))
    module.weight[...] = -jnp.abs(module.weight[...])
    x = size * jnp.abs(tokens())

    def total(module: Router) -> tuple[jax.Array, Routing]:
        routing = module(x)
        return routing.weights_TK.sum() + stats_of(routing, 4).sequence_aux, routing

    grad, routing = jax.jit(jax.grad(total, has_aux=True))(module)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((grad, routing)))


def test_affinities_that_underflow_to_zero_give_zero_weights():
    module = router(CONFIG)
    module.weight[...] = -jnp.abs(module.weight[...])
    routing = route(module, 300 * jnp.abs(tokens()))
    assert not routing.scores_TE.any()
    assert not routing.weights_TK.any()


def test_gradient_reaches_the_router_through_the_weights_but_never_the_bias():
    pull = jax.random.normal(jax.random.key(3), (TOKENS, 2))
    grad = jax.jit(jax.grad(lambda module: (module(tokens()).weights_TK * pull).sum()))(
        router(CONFIG)
    )
    assert jnp.abs(grad.bias[...]).max() == 0
    assert jnp.abs(grad.weight[...]).min() > 0


def random_routing(config: Model, batch: int, time: int) -> Routing:
    scores = affinities(config)[: batch * time]
    experts = select(jnp.asarray(scores), jnp.zeros(config.experts), config)
    return Routing(experts, weigh(jnp.asarray(scores), experts, config), jnp.asarray(scores))


def aux_by_formula(scores: np.ndarray, experts: np.ndarray, config: Model) -> float:
    """V3 equations 17 to 20 on the tokens given, without the weight alpha."""
    tokens, total = len(scores), 0.0
    for expert in range(config.experts):
        count = sum(expert in row for row in experts.tolist())
        f = config.experts / (config.top_k * tokens) * count
        p = np.mean([token[expert] / token.sum() for token in scores.astype(np.float64)])
        total += f * p
    return total


@pytest.mark.parametrize("case", ["greedy", "noaux_tc", "noaux_tc, 2 of 3 groups"])
def test_auxiliary_losses_equal_the_formula(case):
    config, batch, time = CONFIGS[case], 4, 7
    routing = random_routing(config, batch, time)
    scores, experts = np.asarray(routing.scores_TE), np.asarray(routing.experts_TK)
    found = stats_of(routing, batch)
    rows = [slice(start, start + time) for start in range(0, batch * time, time)]
    expected = np.mean([aux_by_formula(scores[row], experts[row], config) for row in rows])
    np.testing.assert_allclose(found.sequence_aux, expected, rtol=1e-5)
    np.testing.assert_allclose(found.batch_aux, aux_by_formula(scores, experts, config), rtol=1e-5)
    assert abs(found.sequence_aux - found.batch_aux) > 1e-3


def test_load_counts_every_choice():
    routing = random_routing(CONFIG, 4, 7)
    load = stats_of(routing, 4).load_E
    assert load.sum() == 4 * 7 * CONFIG.top_k
    np.testing.assert_array_equal(
        load, np.bincount(np.asarray(routing.experts_TK).ravel(), minlength=8)
    )


def test_auxiliary_losses_of_perfectly_even_routing_are_one():
    experts = jnp.arange(16).reshape(8, 2) % 8
    routing = Routing(experts, jnp.ones((8, 2)), jnp.full((8, 8), 0.3))
    stats = stats_of(routing, 2)
    np.testing.assert_allclose((stats.sequence_aux, stats.batch_aux), 1.0, rtol=1e-6)


def test_of_one_sequence_both_auxiliary_losses_are_equal():
    stats = stats_of(random_routing(CONFIG, 1, 30), 1)
    np.testing.assert_allclose(stats.batch_aux, stats.sequence_aux, rtol=1e-6)


def test_auxiliary_loss_pulls_overloaded_experts_down():
    module = router(CONFIG, np.zeros(8))

    def aux(bias_like: jax.Array) -> jax.Array:
        routing = module(tokens())
        shifted = routing.scores_TE * jnp.exp(bias_like)
        return stats_of(routing._replace(scores_TE=shifted), 1).sequence_aux

    load = stats_of(route(module, tokens()), 1).load_E
    grad = jax.jit(jax.grad(aux))(jnp.zeros(8))
    assert grad[load.argmax()] > 0 > grad[load.argmin()]
