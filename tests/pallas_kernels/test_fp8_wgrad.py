"""The FP8 weight gradients: reference against float64, kernel against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.fp8_wgrad import fp8_grouped_wgrad, fp8_wgrad
from tests.products import (
    COLUMN_GROUPS,
    assert_no_gradient,
    assert_refuses,
    counts,
    fp8_column_groups,
    fp8_columns,
    group_slices,
    relative_error,
    true,
)

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")

NAMES = ("a", "a_scale", "b", "b_scale", "group_sizes")


def by_group(operands):
    a, a_scale, b, b_scale, sizes = operands
    left, right = true(a, a_scale), true(b, b_scale)
    groups = group_slices(np.asarray(sizes), unit=128)
    return np.stack([left[:, columns] @ right[:, columns].T for columns in groups])


def same_rounded(found, exact):
    return found.dtype == jnp.bfloat16 and (found == exact.astype(jnp.bfloat16)).all()


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 16), (7, 72, 144), (130, 136, 128), (33, 576, 1008)]
)
def test_dense(m, n, k):
    a, a_scale, b, b_scale = operands = fp8_columns(m, n, k)
    expected = true(a, a_scale) @ true(b, b_scale).T
    out = fp8_wgrad(*operands)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected) <= 2e-6
    assert same_rounded(fp8_wgrad(*operands, out_dtype=jnp.bfloat16), out)
    more = jnp.asarray(np.random.default_rng(0).normal(size=(m, n)) * 1e4, jnp.float32)
    assert relative_error(fp8_wgrad(*operands, accumulate=more), expected + more) <= 2e-6


@pytest.mark.parametrize("sizes", COLUMN_GROUPS.values(), ids=COLUMN_GROUPS)
def test_grouped_columns_behind_may_hold_anything(sizes):
    operands = fp8_column_groups(sizes)
    expected = by_group(operands)
    out = fp8_grouped_wgrad(*operands)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected) <= 2e-6
    assert same_rounded(fp8_grouped_wgrad(*operands, out_dtype=jnp.bfloat16), out)
    more = jnp.full(expected.shape, 1e4, jnp.float32)
    assert relative_error(fp8_grouped_wgrad(*operands, accumulate=more), expected + more) <= 2e-6
    assert not np.any(np.asarray(out)[np.array(sizes) == 0])


@jax.jit
def jitted_grouped(*operands):
    return fp8_grouped_wgrad(*operands)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 256), min_size=3, max_size=3), st.integers(0, 99))
def test_any_groups(sizes, seed):
    operands = fp8_column_groups(sizes, k=768, seed=seed)
    assert relative_error(jitted_grouped(*operands), by_group(operands)) <= 2e-6


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 20), st.integers(0, 99))
def test_any_dense_shape(m, n_eighths, k_sixteenths, seed):
    a, a_scale, b, b_scale = operands = fp8_columns(m, 8 * n_eighths, 16 * k_sixteenths, seed)
    assert relative_error(fp8_wgrad(*operands), true(a, a_scale) @ true(b, b_scale).T) <= 2e-6


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 128), (4, 0, 128), (4, 8, 0)])
def test_zero_sizes(m, n, k):
    more = jnp.ones((2, m, n))
    operands, groups = fp8_columns(m, n, k), counts([k, 0])
    assert np.array_equal(fp8_wgrad(*operands), np.zeros((m, n)))
    assert np.array_equal(fp8_wgrad(*operands, accumulate=more[0]), more[0])
    assert np.array_equal(fp8_grouped_wgrad(*operands, groups), np.zeros((2, m, n)))
    assert np.array_equal(fp8_grouped_wgrad(*operands, groups, accumulate=more), more)


def test_no_groups():
    assert fp8_grouped_wgrad(*fp8_columns(4, 8, 128), counts([])).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": jnp.zeros((4, 128))}, r"a is float32 \(4, 128\): expected float8_e4m3fn \[M, K\]"),
        ({"b_scale": jnp.zeros((1, 1))}, r"b_scale is float32 \(1, 1\): expected .* \(8, 1\)"),
        ({"accumulate": jnp.zeros((8, 4))}, r"accumulate is float32 \(8, 4\): .* \(4, 8\)"),
        ({"accumulate": jnp.zeros((4, 8), jnp.bfloat16)}, "accumulate is bfloat16"),
        ({"accumulate": jnp.zeros((4, 8)), "out_dtype": jnp.bfloat16}, "out_dtype is bfloat16"),
        ({"out_dtype": jnp.float16}, "out_dtype is float16"),
        (dict(zip(NAMES, fp8_columns(4, 8, 120), strict=False)), "K is 120: .* of 16"),
        ({"backend": "cublas"}, "backend is 'cublas'"),
    ],
)
def test_dense_refuses(change, message):
    good = dict(zip(NAMES, fp8_columns(4, 8, 128), strict=False))
    assert_refuses(fp8_wgrad, good, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(zip(NAMES, fp8_columns(4, 8, 144), strict=False)), "K is 144: .* of 128"),
        ({"group_sizes": counts([-5, 1])}, r"group_sizes\[0\] is -5: expected 0 or more"),
        ({"group_sizes": counts([129, 1])}, r"add up to 384 in whole blocks of 128.* K = 256"),
        ({"group_sizes": counts([[1]])}, r"group_sizes is int32 \(1, 1\): expected int32 \[G\]"),
        ({"accumulate": jnp.zeros((3, 4, 8))}, r"accumulate is .*\(3, 4, 8\): .* \(2, 4, 8\)"),
    ],
)
def test_grouped_refuses(change, message):
    good = dict(zip(NAMES, fp8_column_groups([128, 1], 4, 8, 256), strict=True))
    assert_refuses(fp8_grouped_wgrad, good, change, message)


def test_not_differentiable():
    a, a_scale, b, b_scale = operands = fp8_columns(4, 8, 128)
    assert_no_gradient(fp8_wgrad, *operands)
    assert_no_gradient(fp8_grouped_wgrad, *operands, counts([128]))

    def into(total):
        return fp8_wgrad(a, a_scale, b, b_scale, accumulate=total)

    assert_no_gradient(into, jnp.zeros((4, 8)))
