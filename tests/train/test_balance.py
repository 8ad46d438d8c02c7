"""The router bias moves against the load, and the load evens out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.train.balance import max_violation, updated_bias


def test_bias_rises_for_light_experts_falls_for_heavy_ones_and_rests_at_the_mean():
    bias, load = jnp.array([0.5, 0.0, -0.25, 0.0]), jnp.array([1, 9, 5, 5])
    np.testing.assert_allclose(
        updated_bias(bias, load, jnp.float32(0.1)), [0.6, -0.1, -0.25, 0.0], rtol=1e-6
    )


def test_bias_of_several_layers_follows_each_layers_own_mean():
    load = jnp.array([[0, 10], [100, 60]])
    moved = updated_bias(jnp.zeros((2, 2)), load, jnp.float32(0.5))
    assert moved.tolist() == [[0.5, -0.5], [-0.5, 0.5]]


def test_bias_rests_at_speed_zero():
    bias = jnp.array([0.3, -0.3])
    assert updated_bias(bias, jnp.array([7, 1]), jnp.float32(0)).tolist() == bias.tolist()


@pytest.mark.parametrize(
    ("load", "expected"),
    [([5, 5, 5, 5], 0.0), ([8, 4, 4, 0], 1.0), ([10, 10, 0, 0], 1.0), ([20, 0, 0, 0], 3.0)],
)
def test_max_violation_is_the_heaviest_load_above_the_mean_in_means(load, expected):
    assert float(max_violation(jnp.array(load))) == pytest.approx(expected)


def test_max_violation_of_layers_is_one_number_each():
    assert max_violation(jnp.array([[3, 1], [2, 2]])).tolist() == pytest.approx([0.5, 0.0])


def test_max_violation_of_nothing_routed_is_zero():
    assert float(max_violation(jnp.zeros(4, jnp.int32))) == 0.0


def test_bias_evens_out_a_skewed_router():
    noise = jax.random.normal(jax.random.key(0), (2048, 8))
    scores = jax.nn.sigmoid(noise + jnp.linspace(-2, 2, 8))

    def load_at(bias: jax.Array) -> jax.Array:
        return jnp.bincount(jax.lax.top_k(scores + bias, 2)[1].reshape(-1), length=8)

    def move(_: int, bias: jax.Array) -> jax.Array:
        return updated_bias(bias, load_at(bias), jnp.float32(0.005))

    bias = jax.jit(lambda: jax.lax.fori_loop(0, 300, move, jnp.zeros(8)))()
    assert float(max_violation(load_at(jnp.zeros(8)))) > 1.0
    assert float(max_violation(load_at(bias))) < 0.05
