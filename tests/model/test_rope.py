"""Rotary positions and YaRN's arithmetic."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Model, Yarn
from dsjax.model.rope import inverse_frequencies, rotate, rotation, softmax_scale
from tests.tiny import CONFIG

V3 = Model()
V2_LITE = replace(V3, yarn=Yarn(mscale=0.707, mscale_all_dim=0.707))
PLAIN = replace(CONFIG, qk_rope_dim=16)


@jax.jit
def turn_by(x: jax.Array, positions: jax.Array) -> jax.Array:
    return rotate(x, rotation(PLAIN, positions))


def turned(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(turn_by(x, positions))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_rotation_keeps_norms():
    x, positions = random(2, 5, 3, 16), np.arange(10).reshape(2, 5) * 37
    found = turned(x, positions)
    assert not np.allclose(found, x)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_dot_products_depend_on_the_distance_alone():
    q, k = np.repeat(random(2, 1, 16), 4, axis=1)[:, :, None].swapaxes(1, 2)
    at = np.array([[9, 12, 40, 109]])
    near = (turned(q, at) * turned(k, at - 4)).sum(-1)
    far = (turned(q, at) * turned(k, at - 5)).sum(-1)
    np.testing.assert_allclose(near, np.broadcast_to(near[..., :1], near.shape), rtol=1e-3)
    assert np.abs(near - far).min() > 0.01


def test_interleaved_pairs_turn_as_complex_numbers():
    x, positions = random(2, 5, 3, 16), np.array([[0, 1, 2, 3, 4], [7, 8, 50, 99, 127]])
    freq = 10000.0 ** (-np.arange(8) / 8)
    turn = np.exp(1j * positions[..., None] * freq)[:, :, None]
    expected = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    found = turned(x, positions)
    np.testing.assert_allclose(found[..., 0::2], expected.real, atol=2e-5)
    np.testing.assert_allclose(found[..., 1::2], expected.imag, atol=2e-5)


def test_heads_share_the_angles_of_the_shared_key():
    x, positions = random(1, 6, 16), np.arange(6)[None]
    heads = turned(np.stack([x, x], axis=2), positions)
    np.testing.assert_array_equal(heads[:, :, 0], turned(x, positions))
    np.testing.assert_array_equal(heads[:, :, 1], turned(x, positions))


def test_rotation_is_computed_in_float32_and_returned_in_the_format_of_x():
    x = jnp.asarray(random(1, 4, 16), jnp.bfloat16)
    turn = rotation(PLAIN, jnp.arange(4)[None])
    found = rotate(x, turn)
    assert (turn.dtype, found.dtype) == (jnp.float32, jnp.bfloat16)
    exact = rotate(x.astype(jnp.float32), turn)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_yarn_of_v3_keeps_pairs_up_to_10_and_slows_those_from_23():
    plain = inverse_frequencies(replace(V3, yarn=None))
    ratio = inverse_frequencies(V3) / plain
    assert len(plain) == 32
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-12)
    np.testing.assert_allclose(ratio[23:], 1 / 40, rtol=1e-12)
    inside = (np.arange(10, 24) - 10) / 13
    np.testing.assert_allclose(ratio[10:24], 1 - inside + inside / 40, rtol=1e-12)


def test_without_yarn_frequencies_are_powers_of_theta():
    freq = inverse_frequencies(replace(V3, yarn=None, rope_theta=500.0))
    np.testing.assert_allclose(freq, 500.0 ** (-2 * np.arange(32) / 64), rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "scale"), [(V3, 0.1352338), (V2_LITE, 0.1147214)], ids=["v3", "v2_lite"]
)
def test_softmax_scale_of_the_published_models(config, scale):
    assert softmax_scale(config) == pytest.approx(scale, abs=5e-8)


@pytest.mark.parametrize("yarn", [None, Yarn(mscale_all_dim=0.0), Yarn(factor=1.0)])
def test_softmax_scale_without_mscale_is_the_width_to_the_minus_half(yarn):
    assert softmax_scale(replace(V3, yarn=yarn)) == 192**-0.5


@pytest.mark.parametrize("config", [V3, V2_LITE])
def test_equal_mscales_leave_the_rotated_length_alone(config):
    length = jnp.linalg.norm(rotation(config, jnp.arange(3)[None]), axis=-1)
    np.testing.assert_allclose(length, 1.0, rtol=1e-6)


def test_unequal_mscales_lengthen_rotated_vectors():
    config = replace(V3, yarn=Yarn(mscale=1.0, mscale_all_dim=0.0))
    length = jnp.linalg.norm(rotation(config, jnp.arange(3)[None]), axis=-1)
    np.testing.assert_allclose(length, 0.1 * np.log(40) + 1, rtol=1e-6)


def test_angles_stay_exact_at_the_end_of_the_context():
    position, config = V3.context - 1, V3
    found = jax.jit(lambda at: rotation(config, at))(jnp.array([[position]]))[0, 0]
    angle = position * inverse_frequencies(config)
    expected = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    np.testing.assert_allclose(found, expected, atol=0.02)
