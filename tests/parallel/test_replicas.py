"""Replicated experts give the results of the experts themselves, and share the tokens evenly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.config import Exchange, Mesh
from dsjax.model import Transformer
from dsjax.model.moe import routed_experts
from dsjax.model.replicas import spread_over_replicas
from dsjax.parallel import build_mesh, choose_exchange
from dsjax.parallel.balance import ExpertPlan, rebalance_experts
from dsjax.parallel.replicas import place_experts, with_replicas
from pallas_kernels.fp8_recipe import Recipe
from pallas_kernels.fp8_weight import Fp8Weight
from tests.tiny import CONFIG, random_tokens, random_transformer

LAYERS, EXPERTS, REPLICAS, DIM, HIDDEN, TOKENS, TOP_K = 2, 8, 12, 16, 24, 40, 3


def make_plan(seed: int) -> ExpertPlan:
    weight = np.random.default_rng(seed).pareto(1, (LAYERS, EXPERTS))
    return rebalance_experts(weight, REPLICAS, 4, 2, 4)


def draw_experts() -> dict[str, jax.Array]:
    gate_up, down = jax.random.split(jax.random.key(0))
    return {
        "gate_up": 0.3 * jax.random.normal(gate_up, (LAYERS, EXPERTS, DIM, 2 * HIDDEN)),
        "down": 0.3 * jax.random.normal(down, (LAYERS, EXPERTS, HIDDEN, DIM)),
    }


def draw_routing(seed: int, tokens: int = TOKENS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(EXPERTS, TOP_K, replace=False) for _ in range(tokens)]
    return np.array(chosen, np.int32)


def draw_tokens() -> tuple[jax.Array, jax.Array]:
    x, weights = jax.random.split(jax.random.key(1))
    return jax.random.normal(x, (TOKENS, DIM)), jax.random.uniform(weights, (TOKENS, TOP_K))


def layer_of(plan: ExpertPlan, layer: int) -> tuple[np.ndarray, np.ndarray]:
    return plan.logical_to_physical[layer], plan.logical_count[layer]


def test_a_layer_with_replicas_gives_the_results_of_the_layer_without():
    plan, weights, (x, gates) = make_plan(0), draw_experts(), draw_tokens()
    placed = place_experts(weights, plan.physical_to_logical)
    run = jax.jit(routed_experts)
    for layer in range(LAYERS):
        chosen = draw_routing(layer)
        physical = jax.jit(spread_over_replicas)(chosen, *layer_of(plan, layer))
        found = run(x, physical, gates, placed["gate_up"][layer], placed["down"][layer])
        wanted = run(x, chosen, gates, weights["gate_up"][layer], weights["down"][layer])
        assert len(np.unique(physical)) > EXPERTS
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_fp8_scales_move_with_their_values_and_gauges_stay():
    plan, rng = make_plan(1), np.random.default_rng(1)
    values = rng.normal(size=(4, LAYERS, EXPERTS, 4, 6))
    weight = Fp8Weight(
        master=jnp.asarray(values[0], jnp.bfloat16),
        gauge=jnp.asarray(rng.normal(size=(LAYERS, 3)), jnp.float32),
        q=jnp.asarray(values[1], jnp.float8_e4m3fn),
        scale=jnp.asarray(values[2, ..., :1, :2], jnp.float32),
        q_t=jnp.asarray(values[3].swapaxes(-1, -2), jnp.float8_e4m3fn),
        recipe=Recipe(sum_bits=14),
    )
    placed = place_experts({"down": weight}, plan.physical_to_logical)["down"]
    np.testing.assert_array_equal(placed.gauge, weight.gauge)
    assert placed.recipe == weight.recipe
    for name in ("master", "q", "scale", "q_t"):
        found, given = getattr(placed, name), getattr(weight, name)
        for layer, order in enumerate(plan.physical_to_logical):
            np.testing.assert_array_equal(found[layer], given[layer][order])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_every_array_of_a_pytree_is_put_in_physical_order(dtype):
    plan, rng = make_plan(2), np.random.default_rng(2)
    weights = [
        {"q": jnp.asarray(rng.integers(-9, 9, (LAYERS, EXPERTS, 4, 6)), dtype)},
        (jnp.asarray(rng.normal(size=(LAYERS, EXPERTS, 1, 2)), jnp.float32),),
    ]
    placed = jax.jit(place_experts)(weights, plan.physical_to_logical)
    for found, given in zip(jax.tree.leaves(placed), jax.tree.leaves(weights), strict=True):
        assert found.dtype == given.dtype
        for layer, order in enumerate(plan.physical_to_logical):
            for place, expert in enumerate(order):
                np.testing.assert_array_equal(found[layer, place], given[layer, expert])


def test_one_layers_weights_take_one_layers_order():
    plan, weight = make_plan(3), draw_experts()["down"]
    stacked = place_experts(weight, plan.physical_to_logical)
    for layer in range(LAYERS):
        alone = place_experts(weight[layer], plan.physical_to_logical[layer])
        np.testing.assert_array_equal(alone, stacked[layer])


def test_weights_go_from_one_plan_to_the_next_and_a_part_to_its_gpu():
    old, new, weights = make_plan(4), make_plan(5), draw_experts()
    assert (old.physical_to_logical != new.physical_to_logical).any()
    in_old_order = place_experts(weights, old.physical_to_logical)
    way = np.take_along_axis(old.logical_to_physical[..., 0], new.physical_to_logical, axis=1)
    wanted = place_experts(weights, new.physical_to_logical)
    jax.tree.map(np.testing.assert_array_equal, place_experts(in_old_order, way), wanted)
    part = place_experts(weights, new.physical_to_logical[:, 3:6])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, 3:6]), part, wanted)


def test_every_choice_reaches_a_replica_of_its_expert_and_none_stays_none():
    plan, chosen = make_plan(6), draw_routing(1)
    chosen[::5, 1] = -1
    for layer in range(LAYERS):
        physical = np.asarray(spread_over_replicas(chosen, *layer_of(plan, layer)))
        routed = chosen >= 0
        np.testing.assert_array_equal(physical[~routed], -1)
        found = plan.physical_to_logical[layer][physical[routed]]
        np.testing.assert_array_equal(found, chosen[routed])


def test_replicas_of_an_expert_that_all_tokens_choose_differ_by_one_token_at_most():
    places, count = np.array([[4, 1, 3, -1], [0, 2, 5, 6]]), np.array([3, 4])
    for start in (0, 5):
        physical = spread_over_replicas(np.tile([[0, 1]], (41, 1)), places, count, start)
        for choice in range(2):
            tokens = np.bincount(physical[:, choice], minlength=7)[places[choice, : count[choice]]]
            assert tokens.max() - tokens.min() <= 1
            assert tokens.sum() == 41


def test_random_tokens_are_shared_evenly_and_alike_each_time():
    plan, chosen = make_plan(8), draw_routing(2, tokens=3000)
    physical = np.asarray(spread_over_replicas(chosen, *layer_of(plan, 0)))
    again = np.asarray(spread_over_replicas(chosen, *layer_of(plan, 0)))
    np.testing.assert_array_equal(physical, again)
    tokens = np.bincount(physical.reshape(-1), minlength=REPLICAS)
    order = plan.physical_to_logical[0]
    share = np.bincount(chosen.reshape(-1))[order] / plan.logical_count[0][order]
    # Five standard deviations of independent draws.
    assert (abs(tokens - share) < 5 * np.sqrt(share)).all()


def test_the_start_turns_single_tokens_to_all_replicas():
    places, count = np.array([[7, 8, 9]]), np.array([3])
    token = np.zeros((1, 1), int)
    begun = [spread_over_replicas(token, places, count, n).item() for n in range(6)]
    assert begun == [7, 8, 9, 7, 8, 9]


def test_choices_of_a_token_go_to_replicas_of_different_number():
    places, count = np.array([[0, 1], [2, 3]]), np.array([2, 2])
    physical = spread_over_replicas(np.array([[0, 1], [0, 1]]), places, count)
    assert physical.tolist() == [[0, 3], [1, 2]]


def test_experts_that_do_not_exist_are_nan_in_a_traced_plan():
    placed = jax.jit(place_experts)(np.ones((4, 2), np.float32), np.array([3, 4]))
    np.testing.assert_array_equal(placed, [[1, 1], [np.nan, np.nan]])


@pytest.mark.parametrize(
    ("weights", "order", "message"),
    [
        ({"a": np.ones((4, 2)), "b": {"s": np.ones((3, 2))}}, [0, 1], r"b\.s is \(3, 2\).*\[4, "),
        ({"a": np.ones((4, 2))}, [[0, 1]], r"a is \(4, 2\): expected \[1, experts, "),
        ({"a": np.ones(())}, [0, 1], r"a is \(\): expected"),
        (np.ones((2, 4)), [[0, 1]], r"the weight is \(2, 4\): expected \[1, "),
        ({"a": np.ones((4, 2))}, [0, 4], "expert 4: there are 4"),
        ({"a": np.ones((4, 2))}, [0, -1], "expert -1: there are 4"),
        ({"a": np.ones((4, 2))}, [0.0, 1.0], "physical_to_logical is float32"),
        ({"a": np.ones((4, 2))}, [[[0]]], r"physical_to_logical is int32 \(1, 1, 1\)"),
    ],
)
def test_weights_and_orders_that_do_not_fit_are_refused(weights, order, message):
    with pytest.raises(ValueError, match=message):
        place_experts(weights, np.array(order))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts_TK": np.zeros(3, int)}, "experts_TK is int32"),
        ({"experts_TK": np.zeros((3, 2))}, "experts_TK is float32"),
        ({"logical_to_physical": np.zeros(3, int)}, "logical_to_physical is int32"),
        ({"logical_count": np.ones((2, 4), int)}, "logical_count is int32"),
        ({"logical_count": np.ones(3, int)}, r"logical_count \(3,\)"),
    ],
)
def test_routings_and_plans_that_do_not_fit_are_refused(changed, message):
    fitting = {
        "experts_TK": np.zeros((3, 2), int),
        "logical_to_physical": np.zeros((4, 2), int),
        "logical_count": np.ones(4, int),
    }
    with pytest.raises(ValueError, match=message):
        spread_over_replicas(**{**fitting, **changed})


def balanced_model(depths: int) -> tuple[Transformer, ExpertPlan]:
    model = random_transformer(mtp_depth=1)
    load = np.random.default_rng(5).pareto(1, (2 + depths, CONFIG.experts))
    return model, rebalance_experts(load, 12, 4, 2, 4)


@pytest.mark.parametrize("depths", [0, 1])
def test_logits_of_a_whole_model_stay_and_its_replicas_work(depths):
    model, plan = balanced_model(depths)
    tokens = random_tokens(2, 24)
    run = jax.jit(lambda model, tokens: model(tokens))
    call = functools.partial(run, tokens=tokens)
    placed = with_replicas(model, plan)
    assert placed.moe.mlp.experts.gate_up.shape[1] == 12
    assert model.moe.mlp.experts.gate_up.shape[1] == CONFIG.experts
    np.testing.assert_allclose(call(placed), call(model), atol=2e-5)
    copied = int(np.argmax(plan.logical_count[0]))
    poisoned = place_of(plan, copied)
    weights = placed.moe.mlp.experts.down
    weights.set_value(weights[...].at[0, poisoned].set(jnp.nan))
    assert np.isnan(call(placed)).any()


def place_of(plan: ExpertPlan, expert: int) -> int:
    """Of its second copy, which no model without replicas has."""
    assert plan.logical_count[0, expert] > 1
    return int(plan.logical_to_physical[0, expert, 1])


def test_a_plan_of_other_layers_is_refused():
    model, plan = balanced_model(0)
    short = ExpertPlan(*(part[:1] for part in plan))
    with pytest.raises(ValueError, match="plan has 1 layers: the model has 2 with experts and 1"):
        with_replicas(model, short)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_replicas_are_spread_over_devices_as_experts_are():
    """A plan numbers its places GPU by GPU, as an exchange does."""
    mesh = build_mesh(Mesh(data=2, fsdp=1, expert=4))
    plan, weights, (x, gates) = make_plan(0), draw_experts(), draw_tokens()
    chosen = draw_routing(0)
    placed = place_experts(weights, plan.physical_to_logical)
    spread = P(mesh.axis_names)

    def layer(x, chosen, gates, gate_up, down):
        physical = spread_over_replicas(chosen, *layer_of(plan, 0))
        exchange = choose_exchange(Exchange(), mesh)
        return routed_experts(x, physical, gates, gate_up, down, exchange)

    found = jax.jit(
        jax.shard_map(
            layer, mesh=mesh, in_specs=(spread, spread, spread, P("expert"), P("expert")),
            out_specs=spread, check_vma=False,
        )
    )(x, chosen, gates, placed["gate_up"][0], placed["down"][0])  # fmt: skip
    wanted = routed_experts(x, chosen, gates, weights["gate_up"][0], weights["down"][0])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
