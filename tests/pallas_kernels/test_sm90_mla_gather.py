"""Decode from an FP8 cache and from chosen tokens on Hopper: interpreted, lowered, on a card."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_mla_combine, sm90_mla_decode, sm90_mla_sparse
from pallas_kernels.latent_cache import quantize_latent_cache
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_sparse import mla_sparse_decode, mla_sparse_prefill
from pallas_kernels.sm90_mla_plan import plan

SCALE = 192**-0.5
GARBAGE = 2147480000


def draw(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape) / 10
    return jnp.asarray(np.clip(values, -1, 1), jnp.bfloat16)


def paged(lengths, seed=0):
    """(FP8 cache, the same with NaN and garbage wherever no request has a token, block table)."""
    rng = np.random.default_rng(seed)
    b, width = len(lengths), max(1, -(-max(lengths) // 64)) + 1
    pages = b * width + 1
    cache = quantize_latent_cache(draw(pages, 64, 576, seed=seed), backend="reference")
    table = rng.permutation(pages)[: b * width].reshape(b, width).astype(np.int32)
    spoiled = np.full(cache.shape, 0x7F, np.uint8)
    for row, length in enumerate(lengths):
        used = -(-length // 64)
        for i in range(used):
            last = min(64, length - 64 * i)
            spoiled[table[row, i], :last] = np.asarray(cache)[table[row, i], :last]
        table[row, used:] = GARBAGE
    return cache, jnp.asarray(spoiled), jnp.asarray(table)


@contextlib.contextmanager
def no_races():
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield plgpu.InterpretGPUParams(detect_races=True)
    assert "RACE" not in said.getvalue(), said.getvalue()


def assert_near(found, expected):
    out, lse = (np.asarray(x, np.float64) for x in found)
    want, want_lse = (np.asarray(x, np.float64) for x in expected)
    near = np.abs(out - want) <= np.maximum(8e-4, 2.01 / 128 * np.abs(want))
    assert near.all(), np.abs(out - want).max()
    squares = (out**2).sum() + (want**2).sum()
    assert not squares or 1 - 2 * (out * want).sum() / squares < 5e-6
    some = np.isfinite(want_lse)
    np.testing.assert_array_equal(np.isfinite(lse), some)
    np.testing.assert_allclose(lse[some], want_lse[some], rtol=8.01 / 65536, atol=1e-6)


@pytest.mark.slow
def test_fp8_pages():
    lengths, heads = [70, 0, 180], 16
    cache, spoiled, table = paged(lengths)
    q, known = draw(3, 1, heads, 576, seed=1), jnp.asarray(lengths, jnp.int32)
    call = sm90_mla_decode.Decode(heads, heads, SCALE, True, source="tokens")
    dealt = plan(known, 4)
    assert int(dealt.count[0])
    with no_races() as interpret:
        tokens = spoiled.reshape(-1, 656)
        pieces = sm90_mla_decode.decode(
            q[:, 0], tokens, table, known, dealt, call, interpret=interpret
        )
        found = sm90_mla_combine.combine(*pieces, dealt, sms=1, interpret=interpret)
        jax.block_until_ready(found)
    expected = mla_decode(q, cache, table, known, scale=SCALE, backend="reference")
    assert_near(found, (x[:, 0] for x in expected))


def chosen(t, k, tokens, seed=0):
    """Indices with gaps; the last query has none but gaps."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, tokens, (t, k))
    found[rng.random((t, k)) < 0.2] = -1
    found[0, 0] = GARBAGE
    found[-1] = -1
    return jnp.asarray(found, jnp.int32)


@pytest.mark.parametrize("fp8", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_chosen_tokens(fp8):
    cache = draw(3, 64, 576)
    cache = quantize_latent_cache(cache, backend="reference") if fp8 else cache
    q, indices = draw(3, 1, 16, 576, seed=1), chosen(3, 150, 192)[:, None]
    with no_races() as interpret:
        found = sm90_mla_sparse.decode(q, cache, indices, scale=SCALE, sms=2, interpret=interpret)
        jax.block_until_ready(found)
    expected = mla_sparse_decode(q, cache, indices, scale=SCALE, backend="reference")
    assert_near(found, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.uint8])
@pytest.mark.parametrize("heads", [16, 128])
def test_lowers_for_cuda(heads, dtype):
    shape = jax.ShapeDtypeStruct
    kv = shape((256, 576 if dtype == jnp.bfloat16 else 656), dtype)
    operands = shape((5, heads, 576), jnp.bfloat16), kv, shape((5, 200), jnp.int32)
    run = functools.partial(sm90_mla_sparse.prefill, scale=SCALE, sms=132)
    text = jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "queries", "heads"),
    [([20], 1, 64), ([140, 4096, 0, 5], 1, 16), ([4096, 1, 65], 2, 128), ([300] * 64, 1, 3),
     ([4096] * 6, 4, 9), ([64, 128, 192, 256], 2, 64)],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_card_fp8_pages(lengths, queries, heads, causal):
    cache, spoiled, table = paged(lengths)
    q = draw(len(lengths), queries, heads, 576, seed=1)
    known = jnp.asarray(lengths, jnp.int32)
    run = functools.partial(mla_decode, scale=SCALE, causal=causal)
    found, again = (
        jax.jit(functools.partial(run, backend="mosaic_gpu"))(q, spoiled, table, known)
        for _ in range(2)
    )
    assert_near(found, run(q, cache, table, known, backend="reference"))
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [18, 40])
def test_card_large_scales(exponent):
    """Scales above 2**7, which take a second product, beside some below it."""
    latent = draw(4, 64, 576).astype(jnp.float32)
    large = latent * 2.0 ** jnp.where(jnp.arange(4)[:, None, None] % 2 == 0, exponent, exponent - 9)
    cache = quantize_latent_cache(large.astype(jnp.bfloat16), backend="reference")
    q = draw(2, 1, 64, 576, seed=1) * 2.0**-exponent
    table, lengths = jnp.asarray([[0, 1], [3, 2]]), jnp.asarray([128, 90])
    run = functools.partial(mla_decode, q, cache, table, lengths, scale=SCALE)
    (out, lse), (want, want_lse) = (run(backend=b) for b in ("mosaic_gpu", "reference"))
    down = 2.0**-exponent
    assert_near((out * down, lse), (want * down, want_lse))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(
    ("b", "t", "heads", "k"),
    [(1, 1, 64, 2048), (2, 2, 128, 2048), (64, 2, 64, 128), (3, 1, 16, 70), (5, 1, 128, 1)],
)
def test_card_chosen(b, t, heads, k, fp8):
    cache = draw(100, 64, 576)
    spoiled = np.array(cache, np.float32)
    spoiled[50:] = np.nan
    cache, spoiled = (jnp.asarray(x, jnp.bfloat16) for x in (cache, spoiled))
    if fp8:
        cache, spoiled = (quantize_latent_cache(x, backend="reference") for x in (cache, spoiled))
    q = draw(b, t, heads, 576, seed=1)
    indices = chosen(b * t, k, 50 * 64).reshape(b, t, k)
    run = jax.jit(functools.partial(mla_sparse_decode, scale=SCALE, backend="mosaic_gpu"))
    found, again = run(q, spoiled, indices), run(q, spoiled, indices)
    assert_near(found, mla_sparse_decode(q, cache, indices, scale=SCALE, backend="reference"))
    for x, y in zip(found, again, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.gpu
def test_card_prefill():
    kv, q = draw(3000, 576).at[2900:].set(jnp.nan), draw(500, 128, 576, seed=1)
    indices = chosen(500, 1000, 2900)
    found = mla_sparse_prefill(q, kv, indices, scale=SCALE, backend="mosaic_gpu")
    assert_near(found, mla_sparse_prefill(q, kv, indices, scale=SCALE, backend="reference"))
