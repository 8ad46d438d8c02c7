"""The FP8 products of activations and weights: reference against float64, kernel against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm, fp8_masked_gemm
from tests.products import (
    BLOCK,
    GROUPS,
    OUT_ERROR,
    assert_no_gradient,
    assert_refuses,
    counts,
    draw_fp8,
    fp8_dense,
    fp8_groups,
    fp8_masked,
    grouped,
    relative_error,
    true,
)

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")

SHAPES = [(1, 8, 16), (7, 72, 144), (64, 128, 128), (130, 136, 1008), (33, 576, 272)]


@pytest.mark.parametrize("out_dtype", OUT_ERROR)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_dense(m, n, k, out_dtype):
    a, a_scale, b, b_scale = fp8_dense(m, n, k)
    out = fp8_gemm(a, a_scale, b, b_scale, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert relative_error(out, true(a, a_scale) @ true(b, b_scale, BLOCK).T) <= OUT_ERROR[out_dtype]


@pytest.mark.parametrize("out_dtype", OUT_ERROR)
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_grouped(sizes, out_dtype):
    a, a_scale, b, b_scale = fp8_groups(72, len(sizes))
    out = fp8_grouped_gemm(a, a_scale, b, b_scale, counts(sizes), out_dtype=out_dtype)
    expected = grouped(true(a, a_scale), true(b, b_scale, BLOCK), sizes)
    assert out.dtype == out_dtype
    assert relative_error(out, expected) <= OUT_ERROR[out_dtype]


def test_grouped_over_many_blocks():
    sizes = [200, 0, 1, 127, 64]
    a, a_scale, b, b_scale = fp8_groups(392, len(sizes), n=136, k=272)
    out = fp8_grouped_gemm(a, a_scale, b, b_scale, counts(sizes), out_dtype=jnp.float32)
    assert relative_error(out, grouped(true(a, a_scale), true(b, b_scale, BLOCK), sizes)) <= 2e-6


@pytest.mark.parametrize("valid", [[5, 0, 24], [24, 24, 24], [0, 0, 1]])
def test_masked_rows_may_hold_anything(valid):
    operands = fp8_masked(3, 24, valid)
    out = fp8_masked_gemm(*operands, out_dtype=jnp.float32)
    a, b = true(*operands[:2]), true(*operands[2:4], BLOCK)
    for group, rows in enumerate(valid):
        expected = a[group, :rows] @ b[group].T
        assert relative_error(np.asarray(out)[group, :rows], expected) <= 2e-6


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_zero_sizes(m, n, k):
    assert np.array_equal(fp8_gemm(*fp8_dense(m, n, k)), np.zeros((m, n)))
    out = fp8_grouped_gemm(*fp8_groups(m, 2, n, k), counts([m, 0]))
    assert np.array_equal(out, np.zeros((m, n)))
    out = fp8_masked_gemm(*fp8_masked(2, m, [0, 0], n, k))
    assert np.array_equal(out, np.zeros((2, m, n)))


def test_no_groups():
    assert fp8_grouped_gemm(*fp8_groups(0, 0), counts([])).shape == (0, 72)
    assert fp8_masked_gemm(*fp8_masked(0, 4, [])).shape == (0, 4, 72)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_any_dense_shape(m, n_eighths, k_sixteenths, seed):
    a, a_scale, b, b_scale = fp8_dense(m, 8 * n_eighths, 16 * k_sixteenths, seed)
    out = fp8_gemm(a, a_scale, b, b_scale, out_dtype=jnp.float32)
    assert relative_error(out, true(a, a_scale) @ true(b, b_scale, BLOCK).T) <= 2e-6


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 25), min_size=4, max_size=4), st.integers(0, 99))
def test_any_groups(sizes, seed):
    operands = fp8_groups(100, 4, seed=seed)
    a, a_scale, b, b_scale = operands
    out = jitted_grouped(*operands, counts(sizes))
    assert relative_error(out, grouped(true(a, a_scale), true(b, b_scale, BLOCK), sizes)) <= 2e-6


@jax.jit
def jitted_grouped(*operands):
    return fp8_grouped_gemm(*operands, out_dtype=jnp.float32)


@settings(deadline=None, max_examples=15)
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 99))
def test_powers_of_two_in_the_scales_come_out(left, right, seed):
    a, a_scale, b, b_scale = fp8_dense(5, 16, 144, seed)
    out = fp8_gemm(a, a_scale, b, b_scale, out_dtype=jnp.float32)
    more = (a, a_scale * 2.0**left, b, b_scale * 2.0**right)
    scaled = fp8_gemm(*more, out_dtype=jnp.float32)
    assert np.array_equal(scaled, out * 2.0 ** (left + right))


DENSE_REFUSALS = [
    ({"a": jnp.zeros((4, 144))}, r"a is float32 \(4, 144\): expected float8_e4m3fn \[M, K\]"),
    ({"b": draw_fp8((1, 8, 144))[0]}, r"b is float8_e4m3fn \(1, 8, 144\): expected .* \[N, K\]"),
    ({"a_scale": jnp.zeros((4, 1))}, r"a_scale is float32 \(4, 1\): expected float32 \(4, 2\)"),
    ({"a_scale": jnp.zeros((4, 2), jnp.bfloat16)}, r"a_scale is bfloat16 .* expected float32"),
    ({"b_scale": jnp.zeros((8, 2))}, r"b_scale is float32 \(8, 2\): expected float32 \(1, 2\)"),
    (dict(zip(("a", "a_scale"), draw_fp8((4, 160)), strict=True)), r"K is 160 in a .* 144 in b"),
    (dict(zip(("b", "b_scale"), draw_fp8((12, 144), 128), strict=True)), "N is 12: .* of 8"),
    ({"out_dtype": jnp.float16}, "out_dtype is float16: expected bfloat16 or float32"),
    ({"backend": "cutlass"}, "backend is 'cutlass': use one of auto"),
]


@pytest.mark.parametrize(("change", "message"), DENSE_REFUSALS)
def test_dense_refuses(change, message):
    names = ("a", "a_scale", "b", "b_scale")
    good = dict(zip(names, fp8_dense(4, 8, 144), strict=True))
    assert_refuses(fp8_gemm, good, change, message)


def test_refuses_a_width_off_the_grid():
    with pytest.raises(ValueError, match="K is 136: expected a multiple of 16"):
        fp8_gemm(*fp8_dense(4, 8, 136))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_sizes": counts([1, 2, 3])}, r"group_sizes is int32 \(3,\): expected int32 \(2,\)"),
        ({"group_sizes": jnp.zeros(2)}, r"group_sizes is float32 \(2,\): expected int32"),
        ({"group_sizes": counts([2, -1])}, r"group_sizes\[1\] is -1: expected 0 or more"),
        ({"group_sizes": counts([3, 2])}, r"\[3, 2\] add up to 5: expected at most M = 4"),
    ],
)
def test_grouped_refuses(change, message):
    names = ("a", "a_scale", "b", "b_scale")
    good = dict(zip(names, fp8_groups(4, 2), strict=True))
    assert_refuses(fp8_grouped_gemm, good, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": counts([1, 5])}, r"counts\[1\] is 5: expected 0 to M_max = 4"),
        ({"counts": counts([-2, 1])}, r"counts\[0\] is -2: expected 0 to M_max = 4"),
        ({"counts": counts([1])}, r"counts is int32 \(1,\): expected int32 \(2,\)"),
        (
            dict(zip(("b", "b_scale"), draw_fp8((3, 8, 144), 128), strict=True)),
            "G is 2 in a .* 3 in b",
        ),
    ],
)
def test_masked_refuses(change, message):
    names = ("a", "a_scale", "b", "b_scale", "counts")
    good = dict(zip(names, fp8_masked(2, 4, [1, 4]), strict=True))
    assert_refuses(fp8_masked_gemm, good, change, message)


def test_traced_sizes_go_unchecked():
    jitted_grouped(*fp8_groups(100, 4), counts([-1, 200, 3, 0])).block_until_ready()


def test_not_differentiable():
    a, a_scale, b, b_scale = fp8_dense(4, 8, 144)
    assert_no_gradient(lambda scale: fp8_gemm(a, scale, b, b_scale), a_scale)
    assert_no_gradient(fp8_gemm, a, a_scale, b, b_scale)
    assert_no_gradient(fp8_grouped_gemm, *fp8_groups(4, 2), counts([1, 3]))
    assert_no_gradient(fp8_masked_gemm, *fp8_masked(2, 4, [1, 4]))


@pytest.mark.parametrize("bits", [10, 13, 23])
def test_sums_keep_so_many_bits_from_one_block_to_the_next(bits):
    """As fewer bits are kept the sum falls behind, by up to 2**-bits of itself for every block."""
    k, blocks = 1024, 8
    a, b = (jnp.ones((rows, k), jnp.float8_e4m3fn) for rows in (8, 16))
    scale = 1 + jnp.arange(blocks, dtype=jnp.float32) / 1000
    out = fp8_gemm(
        a, jnp.broadcast_to(scale, (8, blocks)), b, jnp.ones((1, blocks)),
        out_dtype=jnp.float32, sum_bits=bits,
    )  # fmt: skip
    exact = 128 * float(scale.sum())
    assert (out <= exact * (1 + 1e-6)).all()
    assert (out >= exact * (1 - blocks * 2.0**-bits) - 1e-3).all()
    fraction = np.frexp(np.asarray(out))[0] * 2.0 ** (bits + 1)
    assert (fraction == np.round(fraction)).all()


def test_impossible_bits_are_refused():
    with pytest.raises(ValueError, match="sum_bits is 24"):
        fp8_gemm(*fp8_dense(8, 16, 128), sum_bits=24)
