"""The k largest without sorting, against numpy's stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.radix_topk import radix_topk

EXTREMES = [-np.inf, np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 3.4028235e38, -3.4028235e38, 1.2e-38]
NUMBERS = st.sampled_from(EXTREMES) | st.floats(width=32)


def flushed(row):
    """Denormals count as 0 where the machine takes them for it, so there are none here."""
    row = np.asarray(row)
    return np.where(np.abs(row) < 1.17549435e-38, np.copysign(0, row), row).astype(np.float32)


def with_specials(shape, seed=0, digits=1):
    """Few enough digits for many ties."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.normal(size=shape).astype(np.float32).round(digits)
    x[rng.random(shape) < 0.1] = -np.inf
    for special in (np.nan, np.inf, -0.0):
        x[rng.random(shape) < 0.02] = special
    return x


def true_topk(x, k):
    found = np.full((*x.shape[:-1], k), -1)
    for row in np.ndindex(x.shape[:-1]):
        finite = np.flatnonzero(np.isfinite(x[row]))
        best = finite[np.argsort(-x[row][finite], kind="stable")][:k]
        found[row][: len(best)] = np.sort(best)
    return found


run = jax.jit(radix_topk, static_argnums=1)


@pytest.mark.parametrize("digits", [0, 1, 9])
@pytest.mark.parametrize(
    ("shape", "k"), [((3, 2, 500), 64), ((4, 33), 40), ((5,), 5), ((6, 4999), 2048), ((2, 64), 1)]
)
def test_largest(shape, k, digits):
    x = with_specials(shape, digits=digits)
    found = run(jnp.asarray(x), k)
    assert found.shape == (*shape[:-1], k)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, true_topk(x, k))


@settings(deadline=None, max_examples=60)
@given(st.lists(NUMBERS, min_size=70, max_size=70), st.sampled_from([1, 5, 31, 33, 69, 80]))
def test_anything(row, k):
    x = flushed(row)
    np.testing.assert_array_equal(run(jnp.asarray(x), k), true_topk(x, k))


@pytest.mark.parametrize("value", [0.0, -1.5, 3.4028235e38, -3.4028235e38])
@pytest.mark.parametrize("k", [1, 32, 33, 99, 100, 101])
def test_all_alike(value, k):
    found = run(jnp.full((2, 100), value, jnp.float32), k)
    expected = np.where(np.arange(k) < 100, np.arange(k), -1)
    np.testing.assert_array_equal(found, np.tile(expected, (2, 1)))


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan])
def test_none_finite(value):
    np.testing.assert_array_equal(run(jnp.full((2, 40), value), 7), np.full((2, 7), -1))


@pytest.mark.parametrize("magnitude", [1e-37, 1.0, 1e38])
def test_close_together(magnitude):
    """Neighbouring numbers in float32, of both signs."""
    x = np.float32(magnitude) * np.ones(300, np.float32)
    x = x.view(np.int32) + np.random.default_rng(0).permutation(300).astype(np.int32)
    x = np.concatenate([x.view(np.float32), -x.view(np.float32)])
    for k in (1, 150, 300, 450):
        np.testing.assert_array_equal(run(jnp.asarray(x), k), true_topk(x, k))


def test_nothing():
    np.testing.assert_array_equal(radix_topk(jnp.zeros((2, 0)), 3), np.full((2, 3), -1))
    assert radix_topk(jnp.zeros((2, 3)), 0).shape == (2, 0)
    assert radix_topk(jnp.zeros((0, 5)), 3).shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "k"), [((65, 131072), 2048), ((3, 1000), 200), ((300, 4100), 2048)]
)
def test_card(shape, k):
    for digits in (0, 2, 9):
        x = with_specials(shape, digits=digits)
        np.testing.assert_array_equal(run(jnp.asarray(x), k), true_topk(x, k))
