"""The jnp side of the latent cache against numpy: the format byte by byte, then the writes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.latent_cache import (
    append_latents,
    dequantize_latent_cache,
    power_of_two_scale,
    quantize_latent_cache,
    write_latents,
)

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
GARBAGE = 2147480000
EPS = 1e-6

append = functools.partial(append_latents, backend="reference")
write = functools.partial(write_latents, backend="reference", eps=EPS)
quantize = functools.partial(quantize_latent_cache, backend="reference")


def draw(*shape, seed=0):
    """Normal bfloat16 [..., 576] whose tiles of 128 lie 2**-20 to 2**20 apart."""
    rng = np.random.default_rng([seed, *shape])
    spread = np.exp2(rng.uniform(-20, 20, (*shape, 5))).repeat(128, -1)[..., :576]
    return (rng.normal(size=(*shape, 576)) * spread).astype(BF16)


def with_corners(rows):
    """Tiles of zeros, of subnormals, at 448 times a power of two and just above it, near the end
    of bfloat16, and of a NaN and infinities."""
    rows = np.array(rows)
    rows[0, :128] = 0
    rows[0, 128:256] = 1e-39
    rows[1, :128] = np.linspace(-448, 448, 128)
    rows[1, 128:256] = np.linspace(-450, 450, 128)
    rows[1, 256:384] = np.linspace(-1, 1, 128) * 448 * 2.0**-13
    rows[2, :128] = np.linspace(-3.38e38, 3.38e38, 128)
    rows[2, 130], rows[2, 300], rows[2, 500] = np.nan, np.inf, -np.inf
    rows[3, 512:] = np.nan
    return rows


def token_bytes(row):
    """uint8 [656] of bfloat16 [576], in float64."""
    values, scales = np.empty(512, E4M3), np.empty(4, "<f4")
    for tile in range(4):
        at = slice(128 * tile, 128 * (tile + 1))
        latent = row[at].astype(np.float64)
        amax = np.abs(latent).max()
        if not np.isfinite(amax):
            values[at], scales[tile] = np.nan, np.nan
            continue
        fraction, exponent = np.frexp(max(amax / 448, 1e-4))
        scales[tile] = 2.0 ** (exponent - (fraction == 0.5))
        values[at] = np.clip(latent / scales[tile], -448, 448).astype(np.float32).astype(E4M3)
    parts = values, scales, row[512:]
    return np.concatenate([part.view(np.uint8) for part in parts])


def quantized(rows):
    flat = np.asarray(rows).reshape(-1, 576)
    return np.array([token_bytes(row) for row in flat]).reshape(*rows.shape[:-1], 656)


def as_bytes(x):
    return np.asarray(x).view(np.uint8)


def case(b, t, dtype, *, max_pages=3, spare=4, seed=0):
    """(cache of any bytes, NaN among them, table of pages in any order, positions in any order).

    The table has garbage behind the pages that a request needs; of several tokens the first is
    padding.
    """
    rng = np.random.default_rng([seed, b, t])
    pages, width = b * max_pages + spare, 656 if dtype == np.uint8 else 576 * 2
    cache = rng.integers(0, 256, (pages, 64, width), np.uint8).view(dtype)
    table = rng.permutation(pages)[: b * max_pages].reshape(b, max_pages).astype(np.int32)
    end = rng.integers(t, max_pages * 64 + 1, b)
    positions = np.stack([rng.permutation(n)[:t] for n in end]).astype(np.int32)
    for row, last in zip(table, end - 1, strict=True):
        row[last // 64 + 1 :] = GARBAGE
    if b * t > 1:
        positions[0, 0] = -1
    return cache, table, positions


def scattered(cache, tokens, table, positions):
    """One token after another."""
    cache = as_bytes(cache).copy()
    for b, t in itertools.product(*map(range, positions.shape)):
        if (position := positions[b, t]) >= 0:
            cache[table[b, position // 64], position % 64] = as_bytes(tokens[b, t])
    return cache


def assert_same_bytes(found, expected):
    np.testing.assert_array_equal(as_bytes(found), as_bytes(expected))


def test_format():
    cache = draw(2, 64)
    cache[0] = with_corners(cache[0])
    found = jax.jit(quantize)(cache)
    assert found.dtype == jnp.uint8
    assert_same_bytes(found, quantized(cache))


def test_scale_of_every_magnitude():
    """Of all finite numbers in bfloat16."""
    amax = np.arange(0x7F80, dtype=np.uint16).view(BF16).astype(np.float32)
    scale, inverse = jax.jit(power_of_two_scale)(amax)
    fraction, exponent = np.frexp(np.maximum(amax.astype(np.float64) / 448, 1e-4))
    expected = np.ldexp(1.0, exponent - (fraction == 0.5))
    np.testing.assert_array_equal(scale, expected)
    np.testing.assert_array_equal(inverse, 1 / expected)
    assert (amax / expected <= 448).all()
    assert (amax / expected > 224)[expected > 2.0**-13].all()


def test_dequantize_is_exact():
    rows = with_corners(draw(64))[None]
    packed = quantize(rows)
    values = np.ascontiguousarray(packed[..., :512]).view(E4M3).astype(np.float64)
    scales = np.ascontiguousarray(packed[..., 512:528]).view("<f4").astype(np.float64)
    found = np.asarray(jax.jit(dequantize_latent_cache)(packed))
    assert found.dtype == BF16
    expected = values * scales.repeat(128, -1)
    expected[np.abs(expected) == 2.0**128] *= np.inf
    np.testing.assert_array_equal(found[..., :512].astype(np.float64), expected)
    assert_same_bytes(np.ascontiguousarray(found[..., 512:]), np.ascontiguousarray(rows[..., 512:]))
    assert np.isnan(found[0, 2, 128:512].astype(np.float32)).all()


def test_error_of_fp8():
    """Of normal numbers: half a step of e4m3, 2**-4 of a number at most unless it is subnormal."""
    cache = np.random.default_rng(0).normal(size=(8, 64, 576)).astype(BF16)
    found = np.asarray(dequantize_latent_cache(quantize(cache)), np.float64)
    error, true = (found - cache)[..., :512], cache[..., :512].astype(np.float64)
    assert 2.6e-2 < np.linalg.norm(error) / np.linalg.norm(true) < 2.72e-2
    assert (np.abs(error) <= np.maximum(np.abs(true) / 16, 2.0**-10 * 2.0**-6)).all()


@pytest.mark.parametrize("dtype", [np.uint8, BF16])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (5, 1), (3, 100)])
def test_append(b, t, dtype):
    cache, table, positions = case(b, t, dtype)
    new = draw(b, t)
    found = jax.jit(append)(cache, new, table, positions)
    assert found.dtype == dtype
    tokens = quantized(new) if dtype == np.uint8 else new
    assert_same_bytes(found, scattered(cache, tokens, table, positions))


@pytest.mark.parametrize("dtype", [np.uint8, BF16])
def test_what_has_no_place_is_dropped(dtype):
    """Under jit, where nobody can check it."""
    cache, table, _ = case(2, 1, dtype, max_pages=2)
    table = np.array([[3, GARBAGE], [-1, cache.shape[0]]], np.int32)
    positions = [[-1, 128, 64, 2**31 - 1], [-(2**31), 0, 64, -64]]
    new = draw(2, 4)
    arguments = cache, new, table, np.array(positions, np.int32)
    assert_same_bytes(jax.jit(append)(*arguments), cache)


def finished(down, weight, turn):
    """Norm and rotation in float64, rounded to bfloat16 once."""
    latent, key = np.split(down.astype(np.float64), [512], axis=-1)
    norm = 1 / np.sqrt((latent**2).mean(-1, keepdims=True) + EPS)
    pairs = key.reshape(*key.shape[:-1], 32, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (turn[..., 0] + 1j * turn[..., 1])
    turned = np.stack([turned.real, turned.imag], -1).reshape(key.shape)
    whole = np.concatenate([latent * norm * weight.astype(np.float64), turned], axis=-1)
    return whole.astype(np.float32).astype(BF16)


def projected(b, t, weight_dtype=np.float32, seed=0):
    rng = np.random.default_rng([seed, b, t])
    angle = rng.uniform(0, 2 * np.pi, (b, t, 32))
    turn = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    down = (3 * rng.normal(size=(b, t, 576))).astype(BF16)
    return down, (1 + 0.3 * rng.normal(size=512)).astype(weight_dtype), turn


@pytest.mark.parametrize("weight_dtype", [np.float32, BF16])
def test_write_is_norm_and_rotation_and_append(weight_dtype):
    down, weight, turn = projected(3, 100, weight_dtype)
    cache, table, positions = case(3, 100, BF16)
    cache[:] = 0
    expected = scattered(cache, finished(down, weight, turn), table, positions).view(BF16)
    found = np.asarray(jax.jit(write)(cache, down, weight, turn, table, positions))
    steps = found.view(np.int16).astype(np.int64) - expected.view(np.int16)
    close = np.abs((found - expected).astype(np.float32)) < 1e-6  # where a difference is near 0
    assert (close | (np.abs(steps) <= 1)).all()
    assert np.mean(steps != 0) < 1e-3
    fp8 = jax.jit(write)(quantize(cache), down, weight, turn, table, positions)
    assert np.mean(as_bytes(fp8) != as_bytes(quantize(found))) < 1e-3  # 1e-2 without that rounding


@pytest.mark.parametrize("dtype", [np.uint8, BF16])
def test_a_donated_cache_is_not_copied(dtype):
    cache, table, positions = case(2, 3, dtype)
    arguments = jnp.asarray(cache), *projected(2, 3), table, positions
    step = jax.jit(write, donate_argnums=0)
    memory = step.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.nbytes
    assert memory.temp_size_in_bytes < cache.nbytes / 4
    place = arguments[0].unsafe_buffer_pointer()
    assert step(*arguments).unsafe_buffer_pointer() == place
    assert arguments[0].is_deleted()


@pytest.mark.parametrize("dtype", [np.uint8, BF16])
@pytest.mark.parametrize(("b", "t", "max_pages"), [(0, 1, 2), (2, 0, 2), (2, 1, 0)])
def test_nothing_to_write(b, t, max_pages, dtype):
    cache, _, _ = case(1, 1, dtype)
    table, positions = np.zeros((b, max_pages), np.int32), np.full((b, t), -1, np.int32)
    down, weight, turn = projected(b, t)
    assert_same_bytes(append(cache, down, table, positions), cache)
    assert_same_bytes(jax.jit(write)(cache, down, weight, turn, table, positions), cache)


def test_empty_cache():
    assert quantize(np.zeros((0, 64, 576), BF16)).shape == (0, 64, 656)
    assert dequantize_latent_cache(np.zeros((0, 64, 656), np.uint8)).shape == (0, 64, 576)


def array(*shape, dtype=np.int32):
    return np.zeros(shape, dtype)


WRONG = {
    "page of 32": (
        dict(cache=array(4, 32, 656, dtype=np.uint8)),
        r"\(4, 32, 656\).*\(4, 64, 656\)",
    ),
    "width": (dict(cache=array(4, 64, 576, dtype=np.uint8)), r"\(4, 64, 576\).*\(4, 64, 656\)"),
    "float32": (dict(cache=array(4, 64, 576, dtype=np.float32)), "float32.*bfloat16 or uint8"),
    "rank": (dict(cache=array(64, 656, dtype=np.uint8)), r"\(64, 656\).*\[pages, 64"),
    "new's width": (dict(new=array(2, 3, 512, dtype=BF16)), r"\(2, 3, 512\).*\(2, 3, 576\)"),
    "new's dtype": (dict(new=array(2, 3, 576, dtype=np.float32)), "float32.*bfloat16"),
    "table's rank": (dict(block_table=array(2)), r"\(2,\).*\[b, max_pages\]"),
    "table's b": (dict(block_table=array(3, 2)), r"\(3, 2\).*\(2, 2\)"),
    "table's dtype": (dict(block_table=array(2, 2, dtype=np.int16)), "int16.*int32"),
    "positions": (dict(positions=array(2, 2)), r"\(2, 2\).*\(2, 3\)"),
    "positions' dtype": (dict(positions=array(2, 3, dtype=np.uint32)), "uint32.*int32"),
    "behind the table": (
        dict(positions=np.array([[0, 1, 2], [0, 128, -1]], np.int32)),
        r"positions\[1, 1\] is 128: expected below 128, as block_table has 2 pages",
    ),
    "no such page": (
        dict(block_table=np.array([[0, 7], [4, 2]], np.int32)),
        r"block_table\[1, 0\] is 4, .*positions\[1, 0\].*expected 0 to 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    wrong, message = WRONG[name]
    right = dict(
        cache=array(4, 64, 656, dtype=np.uint8), new=array(2, 3, 576, dtype=BF16),
        block_table=array(2, 2), positions=np.array([[0, 1, 2], [3, -1, -1]], np.int32),
    )  # fmt: skip
    append_latents(**right)
    with pytest.raises(ValueError, match=message):
        append_latents(**right | wrong)
    if "cache" in wrong:
        with pytest.raises(ValueError, match="cache is"):
            dequantize_latent_cache(wrong["cache"])
        with pytest.raises(ValueError, match="cache is"):
            quantize_latent_cache(wrong["cache"])


def test_refusals_of_the_norm_and_the_rotation():
    cache, table, positions = case(2, 3, np.uint8)
    down, weight, turn = projected(2, 3)
    for arguments, message in [
        ((down, weight[:256], turn), r"norm_weight is float32 \(256,\).*\(512,\)"),
        ((down, weight.astype(np.float64), turn), "norm_weight is float64"),
        ((down, weight, turn[:, :2]), r"turn is float32 \(2, 2, 32, 2\).*\(2, 3, 32, 2\)"),
        ((down, weight, turn.astype(BF16)), "turn is bfloat16"),
        ((down.astype(np.float32), weight, turn), "down is float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            write(cache, *arguments, table, positions)


def test_backends():
    cache, table, positions = case(1, 1, BF16)
    for call in (
        functools.partial(append_latents, cache, draw(1, 1), table, positions),
        functools.partial(quantize_latent_cache, cache),
    ):
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            call(backend="cuda")


def test_not_differentiable():
    cache, table, positions = case(1, 1, BF16)
    down, weight, turn = projected(1, 1)

    def loss(weight):
        return write(cache, down, weight, turn, table, positions).astype(jnp.float32).sum()

    with pytest.raises(TypeError, match="not differentiable"):
        jax.grad(loss)(weight)
    with pytest.raises(TypeError, match="not differentiable"):
        jax.grad(lambda x: quantize(x)[0, 0, 0].astype(jnp.float32))(jnp.asarray(cache))
