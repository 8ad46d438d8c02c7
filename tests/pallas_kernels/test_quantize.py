"""The jnp side of FP8 quantisation against numpy, tile by tile."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantize import (
    dequantize,
    padded_rows,
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    requantize_transposed,
    rmsnorm_quantize,
    swiglu_quantize,
    tile_scale,
)

E4M3 = ml_dtypes.float8_e4m3fn
GROUPS = {
    "one": [133],
    "even": [128, 128],
    "uneven": [1, 200, 130],
    "one giant": [0, 300, 0, 0],
    "first and last empty": [0, 77, 256, 0],
    "single rows": [1, 0, 1, 1],
    "rows left over": [20, 0, 129, 7],
}
LEFT_OVER = 11
LEAST = np.float32(448 * 2.0**-60)
"""Largest magnitude of a tile below which its scale does not follow."""


def jitted(function, *operands, **static):
    return jax.jit(functools.partial(function, **static))(*operands)


def draw(shape, dtype=np.float32, seed=0):
    """Normal numbers whose 1 x 128 tiles lie 2**-6 to 2**6 apart."""
    rng = np.random.default_rng([seed, *shape])
    tiles = (*shape[:-1], -(-shape[-1] // 128))
    spread = np.exp2(rng.uniform(-6, 6, tiles)).repeat(128, -1)[..., : shape[-1]]
    return jnp.asarray(rng.normal(size=shape) * spread, dtype)


def rows_of(sizes, name):
    return sum(sizes) + (LEFT_OVER if name == "rows left over" else 0)


def scale_and_inverse(amax, power_of_two):
    scale = (np.maximum(amax, LEAST) / np.float32(448)).astype(np.float32)
    if power_of_two:
        fraction, exponent = np.frexp(scale)
        scale = np.ldexp(np.float32(1), exponent - (fraction == 0.5)).astype(np.float32)
    scale = np.where(np.isfinite(amax), scale, np.float32(np.nan))
    return scale, np.float32(1) / scale


def quantized(x, power_of_two, rows=1, cols=128):
    """One scale for every rows x cols of x [M, K]."""
    x = np.asarray(x, np.float32)
    m, k = x.shape
    padded = np.zeros((-(-m // rows) * rows, -(-k // cols) * cols), np.float32)
    padded[:m, :k] = x
    tiles = padded.reshape(-(-m // rows), rows, -(-k // cols), cols)
    scale, inverse = scale_and_inverse(np.abs(tiles).max((1, 3)), power_of_two)
    with np.errstate(invalid="ignore"):
        q = np.clip(tiles * inverse[:, None, :, None], -448, 448).astype(E4M3)
    return q.reshape(padded.shape)[:m, :k], scale


def transposed(x, sizes, power_of_two):
    x = np.asarray(x, np.float32)
    m, k = x.shape
    spread = np.zeros((padded_rows(m, len(sizes or [])), k), np.float32)
    column = row = 0
    for size in [m] if sizes is None else sizes:
        spread[column : column + size] = x[row : row + size]
        column, row = column + -(-size // 128) * 128, row + size
    q, scale = quantized(spread, power_of_two, rows=128, cols=1)
    return q.T, scale.T


def bits(x):
    """For comparisons: all NaNs alike."""
    x = np.asarray(x)
    return np.where(np.isnan(x.astype(np.float32)), -1, x.view(f"i{x.itemsize}").astype(np.int64))


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(bits(one), bits(other))


def assert_near(found, expected):
    """Scales equal up to rounding, values up to e4m3's next one, and nearly all of them equal."""
    (q, scale), (true_q, true_scale) = found, expected
    np.testing.assert_allclose(scale, true_scale, rtol=2e-5)
    q, true_q = np.asarray(q, np.float32), np.asarray(true_q, np.float32)
    np.testing.assert_allclose(q, true_q, rtol=0.126, atol=2**-9)
    assert np.mean(q != true_q) <= 1e-2


@pytest.mark.parametrize(
    ("shape", "dtype", "power_of_two"),
    [
        ((1, 1), jnp.bfloat16, False),
        ((3, 128), jnp.float32, True),
        ((130, 300), jnp.bfloat16, True),
        ((5, 144), jnp.float32, False),
    ],
)
def test_tiles(shape, dtype, power_of_two):
    x = draw(shape, dtype)
    found = jitted(quantize_tiles, x, power_of_two=power_of_two)
    assert_same_bits(found, quantized(x, power_of_two))


@pytest.mark.parametrize(
    ("shape", "power_of_two"),
    [((130, 300), False), ((2, 3, 5, 129), True), ((4, 256, 128), False), ((1, 1, 1), True)],
)
def test_blocks(shape, power_of_two):
    w = draw(shape, jnp.bfloat16)
    q, scale = jitted(quantize_blocks, w, power_of_two=power_of_two)
    assert scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for index in np.ndindex(shape[:-2]):
        expected = quantized(w[index], power_of_two, rows=128)
        assert_same_bits((q[index], scale[index]), expected)


@pytest.mark.parametrize(("m", "power_of_two"), [(1, False), (128, True), (300, False)])
def test_both_without_groups(m, power_of_two):
    x = draw((m, 48), jnp.bfloat16)
    q, scale, q_t, scale_t = jitted(quantize_both, x, power_of_two=power_of_two)
    assert_same_bits((q, scale), quantized(x, power_of_two))
    assert q_t.shape == (48, padded_rows(m))
    assert_same_bits((q_t, scale_t), transposed(x, None, power_of_two))


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name):
    sizes = GROUPS[name]
    x = draw((rows_of(sizes, name), 144), jnp.bfloat16)
    counts = jnp.array(sizes, jnp.int32)
    q, scale, q_t, scale_t = jax.jit(quantize_both)(x, counts)
    assert_same_bits((q, scale), quantized(x, False))
    assert_same_bits((q_t, scale_t), transposed(x, sizes, False))
    values = np.asarray(q, np.float32) * np.asarray(scale).repeat(128, 1)[:, :144]
    again = jitted(requantize_transposed, q, scale, counts)
    assert_same_bits(again, transposed(values, sizes, False))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 300), min_size=4, max_size=4), st.integers(0, 99))
def test_any_groups(sizes, seed):
    m = 1200
    sizes[3] += m - sum(sizes)
    x = draw((m, 8), seed=seed)
    found = jax.jit(quantize_both)(x, jnp.array(sizes, jnp.int32))
    assert_same_bits(found, (*quantized(x, False), *transposed(x, sizes, False)))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.integers(1, 300), st.booleans(), st.integers(0, 99))
def test_any_shape(m, k, power_of_two, seed):
    x = draw((m, k), seed=seed)
    q, scale = found = jitted(quantize_tiles, x, power_of_two=power_of_two)
    assert_same_bits(found, quantized(x, power_of_two))
    exact = np.asarray(x, np.float64)
    error = np.abs(jitted(dequantize, q, scale, dtype=jnp.float32) - exact)
    least = np.asarray(scale, np.float64).repeat(128, 1)[:, :k] * 2**-10
    assert np.all(error <= np.maximum(np.abs(exact) * 2**-4 * (1 + 1e-6), least))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales_are_correctly_rounded(power_of_two):
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 0x7F800000, 1 << 20, dtype=np.uint32)
    pattern[: 1 << 16] = np.arange(0x3F800000, 0x3F810000)
    least = LEAST.view(np.uint32)
    pattern[-6:] = [0, 1, least, least + 1, 0x7F7FFFFF, 0x7F7F0000]
    scale, inverse = jax.jit(tile_scale, static_argnums=1)(pattern.view(np.float32), power_of_two)
    expected = scale_and_inverse(pattern.view(np.float32), power_of_two)
    assert_same_bits((scale, inverse), expected)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_finite_stays_finite(dtype, power_of_two):
    most = float(jnp.finfo(dtype).max)
    x = np.zeros((6, 256), np.float32)
    x[0, :3] = most, -most, 1
    x[1, 128:] = np.linspace(-1e-40, 1e-40, 128)
    x[2, 0] = 1e-45
    x[3, ::2] = LEAST
    x[4] = np.exp2(np.linspace(-126, 127, 256))
    x[5] = 448 * np.float32(np.float32(1e-4) / 448)
    x = jnp.asarray(x, dtype)
    found = jitted(quantize_both, x, power_of_two=power_of_two)
    for array in found:
        assert np.all(np.isfinite(np.asarray(array, np.float32)))
    expected = (*quantized(x, power_of_two), *transposed(x, None, power_of_two))
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    ("bad", "power_of_two"), [(np.nan, False), (np.nan, True), (-np.inf, False), (np.inf, True)]
)
def test_nan_stays_in_its_tile(bad, power_of_two):
    x = np.array(draw((140, 300)))
    x[3, 200] = bad
    x = jnp.asarray(x, jnp.bfloat16)
    q, scale, q_t, scale_t = jitted(quantize_both, x, power_of_two=power_of_two)
    assert_same_bits((q, scale), quantized(x, power_of_two))
    assert_same_bits((q_t, scale_t), transposed(x, None, power_of_two))
    lost = np.isnan(np.asarray(dequantize(q, scale, jnp.float32)))
    assert lost[3, 128:256].all()
    assert lost.sum() == np.isnan(np.asarray(q, np.float32)).sum() == 128
    assert np.isnan(np.asarray(q_t, np.float32)).sum() == 128
    block, block_scale = jitted(quantize_blocks, x, power_of_two=power_of_two)
    assert np.isnan(np.asarray(block, np.float32)).sum() == 128 * 128
    assert np.isnan(block_scale).sum() == 1


def test_requantised_nan_does_not_reach_the_next_group():
    x = np.array(draw((130, 128)))
    x[64, 5] = np.nan
    q, scale = jitted(quantize_tiles, jnp.asarray(x))
    q_t, _ = jitted(requantize_transposed, q, scale, jnp.array([64, 66], jnp.int32))
    assert not np.isnan(np.asarray(q_t, np.float32))[:, :128].any()
    assert np.isnan(np.asarray(q_t, np.float32))[:, 128:256].all()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_swiglu(power_of_two):
    gate_up = draw((37, 400), jnp.bfloat16)
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    found = jitted(swiglu_quantize, gate_up, power_of_two=power_of_two)
    assert_near(found, quantized(expected, power_of_two))


@pytest.mark.parametrize(("dtype", "power_of_two"), [(jnp.bfloat16, False), (jnp.float32, True)])
def test_rmsnorm(dtype, power_of_two):
    x, weight = draw((37, 200), dtype), draw((1, 200), jnp.bfloat16)[0]
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=1, keepdims=True) + 1e-6)
    expected = quantized(expected * np.asarray(weight, np.float64), power_of_two)
    assert_near(jitted(rmsnorm_quantize, x, weight, eps=1e-6, power_of_two=power_of_two), expected)


def test_dequantize():
    w = draw((2, 130, 200))
    q, scale = quantize_blocks(w)
    each = np.asarray(scale).repeat(128, 1).repeat(128, 2)[:, :130, :200]
    exact = np.asarray(q, np.float32) * each
    np.testing.assert_array_equal(dequantize(q, scale, jnp.float32), exact)
    np.testing.assert_array_equal(dequantize(q, scale), jnp.asarray(exact, jnp.bfloat16))
    np.testing.assert_array_equal(dequantize(q, scale, block_rows=128), dequantize(q, scale))
    q, scale = quantize_tiles(w[0])
    exact = np.asarray(q, np.float32) * np.asarray(scale).repeat(128, 1)[:, :200]
    np.testing.assert_array_equal(dequantize(q, scale, jnp.float32), exact)
    with pytest.raises(ValueError, match=r"scale is float32 \(130, 2\): .* expected .*\(2, 2\)$"):
        dequantize(q, scale, block_rows=128)
    with pytest.raises(ValueError, match="block_rows is 64: expected 1 or 128"):
        dequantize(q, scale, block_rows=64)


@pytest.mark.parametrize("shape", [(0, 256), (3, 0)])
def test_empty(shape):
    m, k = shape
    for backend in ("reference", "mosaic_gpu"):
        x, counts = jnp.zeros(shape), jnp.zeros(2, jnp.int32)
        q, scale, q_t, scale_t = quantize_both(x, counts, backend=backend)
        assert (q.shape, scale.shape) == (shape, (m, -(-k // 128)))
        width = padded_rows(m, 2)
        assert (q_t.shape, scale_t.shape) == ((k, width), (k, width // 128))
        assert not np.asarray(q_t, np.float32).any()
        assert quantize_tiles(x, backend=backend)[0].shape == shape
        assert quantize_blocks(x, backend=backend)[1].shape == (-(-m // 128), -(-k // 128))
        assert requantize_transposed(q, scale, backend=backend)[0].shape == (k, padded_rows(m))
        assert swiglu_quantize(jnp.zeros((m, 2 * k)), backend=backend)[0].shape == shape
        assert rmsnorm_quantize(x, jnp.zeros(k), 1e-6, backend=backend)[0].shape == shape


def test_padded_rows():
    assert padded_rows(0) == 0
    assert padded_rows(129) == 256
    assert padded_rows(129, 3) == 640


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize_tiles(jnp.zeros((2, 16), jnp.float16)), r"x is float16 \(2, 16\)"),
        (lambda: quantize_tiles(jnp.zeros(16)), r"x is float32 \(16,\): expected .* \[M, K\]"),
        (lambda: quantize_blocks(jnp.zeros(16)), r"w is float32 \(16,\): .* \[..., N, K\]"),
        (lambda: quantize_tiles(jnp.zeros((2, 16)), backend="cuda"), "backend is 'cuda'"),
        (
            lambda: quantize_tiles(jnp.zeros((2, 24)), backend="mosaic_gpu"),
            "K is 24: mosaic_gpu takes multiples of 16",
        ),
        (
            lambda: rmsnorm_quantize(
                jnp.zeros((1, 16400)), jnp.zeros(16400), 1e-6, backend="mosaic_gpu"
            ),
            "K is 16400: mosaic_gpu takes multiples of 16 up to 16384",
        ),
        (lambda: swiglu_quantize(jnp.zeros((2, 33))), "2F is 33: expected a multiple of 2"),
        (
            lambda: rmsnorm_quantize(jnp.zeros((2, 32)), jnp.zeros(16), 1e-6),
            r"K is 32 in x \(2, 32\) and 16 in weight \(16,\)",
        ),
        (
            lambda: quantize_both(jnp.zeros((2, 16)), jnp.zeros(3)),
            r"group_sizes is float32 \(3,\)",
        ),
        (
            lambda: quantize_both(jnp.zeros((2, 16)), jnp.array([2, 1], jnp.int32)),
            r"\[2, 1\] add up to 3: expected at most M = 2",
        ),
        (
            lambda: requantize_transposed(jnp.zeros((2, 16), E4M3), jnp.zeros((2, 2))),
            r"q_scale is float32 \(2, 2\): expected float32 \(2, 1\)",
        ),
        (lambda: dequantize(jnp.zeros((2, 16)), jnp.zeros((2, 1))), r"q is float32 \(2, 16\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_not_differentiable():
    with pytest.raises(TypeError, match="quantisation is not differentiable"):
        jax.grad(lambda x: quantize_tiles(x)[1].sum())(jnp.ones((2, 16)))
