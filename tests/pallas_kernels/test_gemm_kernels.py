"""The Hopper kernels of the FP8 and BF16 products against the references, and run to run."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import gemm_reference
from pallas_kernels.bf16_gemm import (
    bf16_gemm,
    bf16_grouped_gemm,
    bf16_grouped_wgrad,
    bf16_masked_gemm,
)
from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm, fp8_masked_gemm
from pallas_kernels.fp8_linear import fp8_grouped_linear, fp8_linear
from pallas_kernels.fp8_wgrad import fp8_grouped_wgrad, fp8_wgrad
from tests import products
from tests.products import COLUMN_GROUPS, counts, relative_error

on_gpu = pytest.mark.gpu

FP8_SUMS, BF16_SUMS, BF16_ROUNDING = 1e-3, 5e-5, 3e-3
BF16_STEP = 2.0**-8  # one number of few may be rounded the other way
"""Relative error that a kernel may have: float32 out of FP8 or BF16 operands, bfloat16 out.

The tensor core keeps fewer bits than float32 of the sum of 128 FP8 products: 1.3e-4 on an H200.
"""

ROWS, WIDTHS, DEPTHS = [1, 7, 64, 130, 1000], [8, 72, 576, 1024], [16, 128, 144, 1536]
NARROW_AND_WIDE = [(8, 16), (64, 144), (72, 144), (576, 1536), (1024, 128)]
SIZES = [
    [300, 0, 1, 723],
    [0, 0, 0, 1024],
    [256, 256, 256, 256],
    [130, 889, 0, 5],
    [1, 0, 1, 1],
    [20, 0, 10],
]
COUNTS = [[5, 0, 200], [200, 200, 200], [0, 64, 1], [129, 63, 128]]


def assert_agrees(function, operands, allowed, compared=slice(None), **options):
    """The kernel is near the reference and equal to itself, bit for bit."""
    results = (
        jax.tree.leaves(function(*operands, backend=backend, **options))
        for backend in ("mosaic_gpu", "mosaic_gpu", "reference")
    )
    for arrays in zip(*results, strict=True):
        first, again, reference = (np.asarray(array, np.float64)[compared] for array in arrays)
        assert relative_error(first, reference) <= allowed
        assert np.array_equal(first, again)


def valid_rows(valid, m=200):
    return np.arange(m) < np.array(valid)[:, None]


def test_kernels_and_references_are_called_alike():
    from pallas_kernels import sm90_gemm

    for name, reference in inspect.getmembers(gemm_reference, callable):
        if name.startswith(("fp8_", "bf16_")):
            kernel = inspect.signature(getattr(sm90_gemm, name))
            assert len(kernel.parameters) == len(inspect.signature(reference).parameters), name


@on_gpu
@pytest.mark.parametrize("k", [1536, 16384])
def test_cut_sums_lose_what_the_tensor_cores_own_do(k):
    """13 bits: cuBLAS's fast accumulation gave 7e-4 at K 1536 and 3e-3 at 16384."""
    a, b = (
        jax.random.normal(jax.random.key(rows), (rows, k)).astype(jnp.float8_e4m3fn)
        for rows in (256, 512)
    )
    ones = jnp.ones((256, k // 128)), jnp.ones((4, k // 128))
    out = fp8_gemm(a, ones[0], b, ones[1], out_dtype=jnp.float32, sum_bits=13)
    expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    error = relative_error(out, expected)
    assert 0.5 < error / (2e-7 * k) < 2


@on_gpu
@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("m", ROWS)
def test_dense(m, n, k):
    operands = products.fp8_dense(m, n, k)
    assert_agrees(fp8_gemm, operands, FP8_SUMS, out_dtype=jnp.float32)
    operands = products.bf16_pair((m, k), (n, k))
    assert_agrees(bf16_gemm, operands, BF16_SUMS, out_dtype=jnp.float32)


@on_gpu
@pytest.mark.parametrize("k", [1536, 16384])
def test_sums_are_promoted(k):
    """In the tensor core's own accumulator they would be off by 7.1e-4, and at 16384 by 3.1e-3."""
    a, a_scale, b, b_scale = products.fp8_dense(256, 512, k)
    out = fp8_gemm(a, a_scale, b, b_scale, out_dtype=jnp.float32)
    expected = products.true(a, a_scale) @ products.true(b, b_scale, products.BLOCK).T
    assert relative_error(out, expected) <= 3e-4


@on_gpu
@pytest.mark.parametrize(("n", "k"), NARROW_AND_WIDE)
@pytest.mark.parametrize("m", [7, 1000])
def test_dense_in_bf16(m, n, k):
    assert_agrees(fp8_gemm, products.fp8_dense(m, n, k), BF16_ROUNDING)
    assert_agrees(bf16_gemm, products.bf16_pair((m, k), (n, k)), BF16_ROUNDING)


@on_gpu
@pytest.mark.parametrize(("n", "k"), NARROW_AND_WIDE)
@pytest.mark.parametrize("sizes", SIZES)
def test_grouped(sizes, n, k):
    m = max(72, sum(sizes))
    used, sizes_there = slice(sum(sizes)), counts(sizes)
    operands = (*products.fp8_groups(m, len(sizes), n, k), sizes_there)
    assert_agrees(fp8_grouped_gemm, operands, BF16_ROUNDING, used)
    operands = (*products.bf16_pair((m, k), (len(sizes), n, k)), sizes_there)
    assert_agrees(bf16_grouped_gemm, operands, BF16_ROUNDING, used)
    operands = products.bf16_row_groups(sizes, m, k, n)
    assert_agrees(bf16_grouped_wgrad, operands, BF16_SUMS)


@on_gpu
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 140), min_size=4, max_size=4))
def test_groups_of_any_size(sizes):
    """One program for all of them: sizes are data."""
    m, used, there = 4 * 140, slice(sum(sizes)), counts(sizes)
    operands = (*products.fp8_groups(m, 4, 136, 256), there)
    assert_agrees(fp8_grouped_gemm, operands, BF16_ROUNDING, used)
    operands = (*products.bf16_pair((m, 64), (4, 136, 64)), there)
    assert_agrees(bf16_grouped_gemm, operands, BF16_ROUNDING, used)
    assert_agrees(bf16_grouped_wgrad, products.bf16_row_groups(sizes, m, 64, 72), BF16_SUMS)


@on_gpu
@settings(deadline=None, max_examples=12)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 20))
def test_any_shape(m, n, k):
    assert_agrees(fp8_gemm, products.fp8_dense(m, 8 * n, 16 * k), BF16_ROUNDING)


@on_gpu
@pytest.mark.parametrize(("n", "k"), NARROW_AND_WIDE)
@pytest.mark.parametrize("valid", COUNTS)
def test_masked(valid, n, k):
    rows = valid_rows(valid)
    assert_agrees(fp8_masked_gemm, products.fp8_masked(3, 200, valid, n, k), BF16_ROUNDING, rows)
    assert_agrees(bf16_masked_gemm, products.bf16_masked(3, 200, valid, n, k), BF16_ROUNDING, rows)


@on_gpu
@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize(("m", "n"), [(7, 8), (64, 1024), (130, 72), (1000, 576)])
def test_wgrad(m, n, k):
    operands = products.fp8_columns(m, n, k)
    assert_agrees(fp8_wgrad, operands, FP8_SUMS)
    assert_agrees(fp8_wgrad, operands, FP8_SUMS, accumulate=jnp.ones((m, n)))
    assert_agrees(fp8_wgrad, operands, BF16_STEP, out_dtype=jnp.bfloat16)


@on_gpu
@pytest.mark.parametrize("sizes", COLUMN_GROUPS.values(), ids=COLUMN_GROUPS)
@pytest.mark.parametrize(("m", "n"), [(7, 8), (130, 72), (576, 1024)])
def test_grouped_wgrad(m, n, sizes):
    operands = products.fp8_column_groups(sizes, m, n)
    assert_agrees(fp8_grouped_wgrad, operands, FP8_SUMS)
    more = jnp.ones((len(sizes), m, n))
    assert_agrees(fp8_grouped_wgrad, operands, FP8_SUMS, accumulate=more)
    assert_agrees(fp8_grouped_wgrad, operands, BF16_STEP, out_dtype=jnp.bfloat16)


@on_gpu
@pytest.mark.parametrize(("n", "k"), [(20, 40), (72, 144), (576, 1536)])
def test_layers(n, k):
    """Backends quantise alike and differ in the sums only."""
    x, dy = products.bf16_pair((1024, k), (1024, n))
    w = products.draw_bf16((4, n, k))
    groups = counts([300, 0, 1, 723])

    def dense(x, w, dy, backend):
        out, pull = jax.vjp(lambda x, w: fp8_linear(x, w, backend=backend), x, w)
        return out, *pull(dy)

    def by_group(x, w, dy, backend):
        out, pull = jax.vjp(lambda x, w: fp8_grouped_linear(x, w, groups, backend=backend), x, w)
        return out, *pull(dy)

    assert_agrees(dense, (x, w[0], dy), BF16_ROUNDING)
    assert_agrees(by_group, (x, w, dy), BF16_ROUNDING)


@on_gpu
def test_auto_takes_the_kernel_under_jit():
    operands = products.fp8_dense(64, 128, 256)
    assert np.array_equal(jax.jit(fp8_gemm)(*operands), fp8_gemm(*operands, backend="mosaic_gpu"))
