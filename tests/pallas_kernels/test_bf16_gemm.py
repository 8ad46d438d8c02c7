"""The BF16 products: reference against float64, kernel against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.bf16_gemm import (
    bf16_gemm,
    bf16_grouped_gemm,
    bf16_grouped_wgrad,
    bf16_masked_gemm,
)
from tests.products import (
    GROUPS,
    OUT_ERROR,
    assert_no_gradient,
    assert_refuses,
    bf16_masked,
    bf16_pair,
    bf16_row_groups,
    counts,
    draw_bf16,
    group_slices,
    grouped,
    relative_error,
    true,
)

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")

SHAPES = [(1, 8, 8), (7, 72, 136), (64, 128, 128), (130, 136, 1000)]


def by_group(x, dy, sizes):
    rows_of = group_slices(np.asarray(sizes))
    return np.stack([true(x)[rows].T @ true(dy)[rows] for rows in rows_of])


@pytest.mark.parametrize("out_dtype", OUT_ERROR)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_dense(m, n, k, out_dtype):
    a, b = bf16_pair((m, k), (n, k))
    out = bf16_gemm(a, b, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert relative_error(out, true(a) @ true(b).T) <= OUT_ERROR[out_dtype]


@pytest.mark.parametrize("out_dtype", OUT_ERROR)
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_grouped_and_its_wgrad(sizes, out_dtype):
    a, b = bf16_pair((72, 136), (len(sizes), 40, 136))
    out = bf16_grouped_gemm(a, b, counts(sizes), out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert relative_error(out, grouped(true(a), true(b), sizes)) <= OUT_ERROR[out_dtype]
    operands = bf16_row_groups(sizes)
    out = bf16_grouped_wgrad(*operands, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert relative_error(out, by_group(*operands)) <= OUT_ERROR[out_dtype]


@pytest.mark.parametrize("valid", [[5, 0, 24], [24, 24, 24], [0, 0, 1]])
def test_masked_rows_may_hold_anything(valid):
    a, b, sizes = bf16_masked(3, 24, valid)
    out = bf16_masked_gemm(a, b, sizes, out_dtype=jnp.float32)
    for group, rows in enumerate(valid):
        expected = true(a)[group, :rows] @ true(b)[group].T
        assert relative_error(np.asarray(out)[group, :rows], expected) <= 2e-6


@jax.jit
def jitted_wgrad(*operands):
    return bf16_grouped_wgrad(*operands)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 100), min_size=3, max_size=3), st.integers(0, 99))
def test_wgrad_of_any_groups(sizes, seed):
    operands = bf16_row_groups(sizes, t=300, seed=seed)
    assert relative_error(jitted_wgrad(*operands), by_group(*operands)) <= 2e-6


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 20), st.integers(0, 99))
def test_any_dense_shape(m, n_eighths, k_eighths, seed):
    a, b = bf16_pair((m, 8 * k_eighths), (8 * n_eighths, 8 * k_eighths), seed)
    assert relative_error(bf16_gemm(a, b, out_dtype=jnp.float32), true(a) @ true(b).T) <= 2e-6


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_zero_sizes(m, n, k):
    a, b = bf16_pair((m, k), (2, n, k))
    assert np.array_equal(bf16_gemm(a, b[0]), np.zeros((m, n)))
    assert np.array_equal(bf16_grouped_gemm(a, b, counts([m, 0])), np.zeros((m, n)))
    masked = bf16_masked_gemm(jnp.stack([a, a]), b, counts([0, 0]))
    assert np.array_equal(masked, np.zeros((2, m, n)))
    x, dy = bf16_pair((m, k), (m, n))
    assert np.array_equal(bf16_grouped_wgrad(x, dy, counts([0, 0])), np.zeros((2, k, n)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": jnp.zeros((4, 16))}, r"a is float32 \(4, 16\): expected bfloat16 \[M, K\]"),
        ({"b": draw_bf16((1, 8, 16))}, r"b is bfloat16 \(1, 8, 16\): expected bfloat16 \[N, K\]"),
        ({"a": draw_bf16((4, 24))}, "K is 24 in a .* 16 in b"),
        ({"b": draw_bf16((9, 16))}, "N is 9: expected a multiple of 8"),
        (
            dict(zip("ab", bf16_pair((4, 12), (8, 12)), strict=True)),
            "K is 12: expected a multiple of 8",
        ),
        ({"out_dtype": jnp.int32}, "out_dtype is int32"),
        ({"backend": "cublas"}, "backend is 'cublas'"),
    ],
)
def test_dense_refuses(change, message):
    good = dict(zip("ab", bf16_pair((4, 16), (8, 16)), strict=True))
    assert_refuses(bf16_gemm, good, change, message)


def test_groups_refuse():
    a, b = bf16_pair((4, 16), (2, 8, 16))
    with pytest.raises(ValueError, match=r"\[3, 2\] add up to 5: expected at most M = 4"):
        bf16_grouped_gemm(a, b, counts([3, 2]))
    with pytest.raises(ValueError, match=r"counts\[0\] is 5: expected 0 to M_max = 4"):
        bf16_masked_gemm(jnp.stack([a, a]), b, counts([5, 0]))
    with pytest.raises(ValueError, match=r"G is 1 in a .* 2 in b"):
        bf16_masked_gemm(a[None], b, counts([5]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": draw_bf16((5, 16))}, "T is 5 in x .* 4 in dy"),
        ({"x": draw_bf16((4, 9))}, "K is 9: expected a multiple of 8"),
        ({"dy": draw_bf16((4, 9))}, "N is 9: expected a multiple of 8"),
        ({"dy": jnp.zeros((4, 8))}, r"dy is float32 \(4, 8\): expected bfloat16 \[T, N\]"),
        ({"group_sizes": counts([4, 1])}, r"\[4, 1\] add up to 5: expected at most T = 4"),
        ({"group_sizes": counts([4, -1])}, r"group_sizes\[1\] is -1"),
        ({"out_dtype": jnp.float16}, "out_dtype is float16"),
    ],
)
def test_wgrad_refuses(change, message):
    x, dy = bf16_pair((4, 16), (4, 8))
    good = {"x": x, "dy": dy, "group_sizes": counts([1, 3])}
    assert_refuses(bf16_grouped_wgrad, good, change, message)


def test_not_differentiable():
    a, b = bf16_pair((4, 16), (2, 8, 16))
    assert_no_gradient(bf16_gemm, a, b[0])
    assert_no_gradient(bf16_grouped_gemm, a, b, counts([1, 3]))
    assert_no_gradient(bf16_masked_gemm, jnp.stack([a, a]), b, counts([1, 3]))
    assert_no_gradient(bf16_grouped_wgrad, a, a, counts([1, 3]))
