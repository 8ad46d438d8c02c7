"""The lightning indexer against numpy in float64: logits, choice of keys, quantisation."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import device, lightning_indexer
from pallas_kernels.index_cache import PAGE_BYTES, join_pages
from pallas_kernels.lightning_indexer import (
    hadamard,
    index_logits,
    index_topk,
    paged_index_logits,
    quantize_index,
)
from pallas_kernels.quantize import quantize_tiles
from tests.pallas_kernels.test_radix_topk import NUMBERS, flushed, true_topk, with_specials

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")
E4M3 = ml_dtypes.float8_e4m3fn
GARBAGE = 2147480000
FINITE_BYTES = np.setdiff1d(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])


def draw(t, s, h, seed=0):
    """q, k, k_scale and weights of a prompt."""
    rng = np.random.default_rng([t, s, h, seed])
    q = jnp.asarray(rng.normal(size=(t, h, 128)), jnp.float32).astype(E4M3)
    k = jnp.asarray(rng.normal(size=(s, 128)), jnp.float32).astype(E4M3)
    k_scale = jnp.asarray(np.exp2(rng.integers(-6, 6, s)), jnp.float32)
    return q, k, k_scale, jnp.asarray(rng.normal(size=(t, h)), jnp.float32)


def true_logits(q, k, k_scale, weights, low, high):
    q, k, k_scale, weights = (np.asarray(x, np.float64) for x in (q, k, k_scale, weights))
    scores = np.maximum(np.einsum("thw,sw->ths", q, k), 0)
    logits = np.einsum("ths,th->ts", scores, weights) * k_scale
    place = np.arange(k.shape[0])
    seen = (place >= np.asarray(low)[:, None]) & (place < np.asarray(high)[:, None])
    return np.where(seen, logits, -np.inf)


def assert_logits(found, expected, rtol=1e-5):
    """-inf at the same places, else near on the scale of a row's logits."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    known = np.isfinite(expected)
    assert np.isfinite(found[known]).all()
    norm = np.linalg.norm(expected[known]) / max(1, known.sum()) ** 0.5
    np.testing.assert_allclose(found[known], expected[known], rtol=rtol, atol=rtol * norm)


def intervals(t, s, seed=0):
    """Of all kinds: causal, empty, reversed, out of range."""
    rng = np.random.default_rng([t, s, seed])
    low, high = np.sort(rng.integers(-5, s + 5, (2, t)), axis=0)
    low[::3], high[::3] = 0, np.minimum(np.arange(0, t, 3) + 1, s)
    low[1::7] = high[1::7] + rng.integers(0, 2, len(low[1::7]))
    return jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)


def paged(b, t, h, lengths, max_pages, seed=0, poison=True):
    """Queries, and a cache whose pages lie scattered among garbage; keys in order too."""
    rng = np.random.default_rng([b, t, h, seed])
    lengths = np.asarray(lengths, np.int32)
    used = -(-lengths // 64)
    pages = used.sum() + 3
    values = jnp.asarray(rng.normal(size=(pages, 64, 128)), jnp.float32).astype(E4M3)
    scales = jnp.asarray(np.exp2(rng.integers(-6, 6, (pages, 64))), jnp.float32)
    cache = np.array(join_pages(values, scales))
    table = np.full((b, max_pages), GARBAGE, np.int32)
    table[:, 1::2] = -7
    order, keys = rng.permutation(pages), []
    for i, own in enumerate(np.split(order[: used.sum()], np.cumsum(used)[:-1])):
        table[i, : used[i]] = own
        k, k_scale = np.asarray(values)[own], np.asarray(scales)[own]
        keys.append((k.reshape(-1, 128)[: lengths[i]], k_scale.reshape(-1)[: lengths[i]]))
        if poison and lengths[i] % 64:
            cache[own[-1], lengths[i] % 64 * 128 : 8192] = 0x7F
            cache[own[-1], 8192:].view("<f4")[lengths[i] % 64 :] = np.nan
    if poison:
        cache[order[used.sum() :]] = 0xFF
    q = jnp.asarray(rng.normal(size=(b, t, h, 128)), jnp.float32).astype(E4M3)
    weights = jnp.asarray(rng.normal(size=(b, t, h)), jnp.float32)
    operands = (q, cache, weights, table, lengths)
    return tuple(map(jnp.asarray, operands)), keys


def true_paged_logits(operands, keys):
    q, _, weights, table, lengths = map(np.asarray, operands)
    b, t = q.shape[:2]
    found = np.full((b, t, table.shape[1] * 64), -np.inf)
    for i, (k, k_scale) in enumerate(keys):
        high = np.maximum(lengths[i] - (t - 1 - np.arange(t)), 0)
        found[i, :, : lengths[i]] = true_logits(q[i], k, k_scale, weights[i], np.zeros(t), high)
    return found


@pytest.mark.parametrize(("t", "s", "h"), [(1, 1, 1), (13, 70, 3), (40, 300, 64), (5, 129, 32)])
def test_logits(t, s, h):
    operands = (*draw(t, s, h), *intervals(t, s))
    assert_logits(index_logits(*operands), true_logits(*operands))


def test_logits_a_few_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(lightning_indexer, "MOST_SCORES", 3 * 4 * 50)
    operands = (*draw(11, 50, 4), *intervals(11, 50))
    assert_logits(jax.jit(index_logits)(*operands), true_logits(*operands))


def test_nan_outside_the_intervals():
    q, k, k_scale, weights = draw(9, 80, 4)
    low, high = jnp.full(9, 20, jnp.int32), jnp.arange(20, 65, 5, dtype=jnp.int32)
    expected = true_logits(q, k, k_scale, weights, low, high)
    outside = (jnp.arange(80) < 20) | (jnp.arange(80) >= 60)
    k = jnp.where(outside[:, None], jnp.nan, k.astype(jnp.float32)).astype(E4M3)
    k_scale = jnp.where(outside, jnp.nan, k_scale)
    assert_logits(index_logits(q, k, k_scale, weights, low, high), expected)


@pytest.mark.parametrize(
    ("t", "h", "lengths"),
    [(1, 64, [0, 1, 64, 65, 200]), (2, 4, [1, 2, 256]), (4, 8, [3, 0, 130, 192])],
)
def test_paged_logits(t, h, lengths):
    operands, keys = paged(len(lengths), t, h, lengths, 4)
    expected = true_paged_logits(operands, keys)
    assert_logits(paged_index_logits(*operands), expected)
    assert_logits(jax.jit(paged_index_logits)(*operands), expected)


def test_paged_logits_are_those_of_the_prompt():
    """Of its last tokens."""
    operands, [(k, k_scale)] = paged(1, 3, 16, [150], 3)
    q, _, weights, *_ = operands
    low, high = jnp.zeros(3, jnp.int32), jnp.arange(148, 151, dtype=jnp.int32)
    prompt = index_logits(q[0], jnp.asarray(k), jnp.asarray(k_scale), weights[0], low, high)
    found = paged_index_logits(*operands)[0, :, :150]
    assert_logits(found, np.asarray(prompt, np.float64))


@pytest.mark.parametrize(("t", "s"), [(0, 5), (5, 0)])
def test_empty_prompt(t, s):
    q, k, k_scale, weights = (x[:n] for x, n in zip(draw(5, 5, 2), (t, s, s, t), strict=True))
    low = jnp.zeros(t, jnp.int32)
    assert index_logits(q, k, k_scale, weights, low, low).shape == (t, s)


def test_empty_cache():
    q, weights = jnp.zeros((2, 1, 4, 128), E4M3), jnp.zeros((2, 1, 4))
    lengths = jnp.zeros(2, jnp.int32)
    for pages, most in ((0, 3), (0, 0), (2, 0)):
        cache = jnp.zeros((pages, PAGE_BYTES), jnp.uint8)
        table = jnp.full((2, most), GARBAGE, jnp.int32)
        found = paged_index_logits(q, cache, weights, table, lengths)
        assert found.shape == (2, 1, most * 64)
        assert np.isneginf(found).all()


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("k", [16, 64, 600])
def test_topk(gpu, k, monkeypatch):
    """Both ways to it, chosen by where it runs."""
    monkeypatch.setattr(device, "is_gpu", lambda: gpu)
    logits = with_specials((3, 2, 500), seed=k)
    np.testing.assert_array_equal(index_topk(jnp.asarray(logits), k), true_topk(logits, k))


@settings(deadline=None, max_examples=20)
@given(st.lists(NUMBERS, min_size=17, max_size=17), st.integers(0, 20))
def test_topk_of_anything(row, k):
    logits = flushed(row)
    np.testing.assert_array_equal(index_topk(jnp.asarray(logits), k), true_topk(logits, k))


def test_topk_of_nothing():
    np.testing.assert_array_equal(index_topk(jnp.zeros((2, 0)), 3), np.full((2, 3), -1))
    assert index_topk(jnp.zeros((0, 5)), 3).shape == (0, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_quantize_index(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 128)), dtype)
    q, scale = quantize_index(x)
    expected = quantize_tiles(x.reshape(15, 128), power_of_two=True)
    np.testing.assert_array_equal(q.reshape(15, 128), expected[0])
    np.testing.assert_array_equal(scale.reshape(15, 1), expected[1])
    assert scale.shape == (3, 5)
    assert np.all(np.frexp(scale)[0] == 0.5)
    back = np.asarray(q, np.float64) * np.asarray(scale)[..., None]
    assert np.abs(back - np.asarray(x, np.float64)).max() <= 2**-3


def sylvester():
    matrix = np.ones((1, 1))
    while len(matrix) < 128:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / 128**0.5


def test_hadamard():
    x = np.random.default_rng(0).normal(size=(2, 7, 128))
    found = hadamard(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, x @ sylvester(), atol=2e-6)
    np.testing.assert_allclose(hadamard(found), x, atol=2e-6)
    narrow = jnp.asarray(x, jnp.bfloat16)
    found = hadamard(narrow)
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(narrow, np.float64) @ sylvester()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_hadamard_leaves_the_scores():
    """And its gradient is itself: the matrix is symmetric."""
    q, k = np.random.default_rng(0).normal(size=(2, 6, 128)).astype(np.float32)
    np.testing.assert_allclose(hadamard(q) @ hadamard(k).T, q @ k.T, atol=1e-4)
    gradient = jax.grad(lambda x: (hadamard(x) * k).sum())(jnp.asarray(q))
    np.testing.assert_allclose(gradient, hadamard(jnp.asarray(k)), atol=1e-5)


def test_quantised_scores_are_near_the_true_ones():
    """The whole path: turned, quantised, scaled back through the weights and k_scale."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(8, 64, 128)), rng.normal(size=(90, 128))
    q[..., 5] *= 30  # an outlier, which the transform spreads
    heads = rng.normal(size=(8, 64)) / 64**0.5
    (q8, q_scale), (k8, k_scale) = (
        quantize_index(hadamard(jnp.asarray(x, jnp.bfloat16))) for x in (q, k)
    )
    weights = jnp.asarray(heads, jnp.float32) * q_scale * 128**-0.5
    low, high = jnp.zeros(8, jnp.int32), jnp.full(8, 90, jnp.int32)
    found = np.asarray(index_logits(q8, k8, k_scale, weights, low, high), np.float64)
    scores = np.maximum(np.einsum("thw,sw->ths", q, k), 0) * 128**-0.5
    expected = np.einsum("ths,th->ts", scores, heads)
    assert np.linalg.norm(found - expected) <= 0.05 * np.linalg.norm(expected)


def prompt(**changes):
    q, k, k_scale, weights = draw(4, 6, 2)
    low = jnp.zeros(4, jnp.int32)
    operands = dict(q=q, k=k, k_scale=k_scale, weights=weights, low=low, high=low)
    return index_logits(**(operands | changes))


def decoding(**changes):
    operands, _ = paged(2, 1, 2, [3, 70], 2)
    names = ("q", "k_cache", "weights", "block_table", "lengths")
    return paged_index_logits(**(dict(zip(names, operands, strict=True)) | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompt(q=jnp.zeros((4, 2, 128))), r"q is float32 \(4, 2, 128\): expected float8"),
        (lambda: prompt(q=jnp.zeros((4, 2, 64), E4M3)), r"\(4, 2, 64\): expected .*\(4, 2, 128\)"),
        (lambda: prompt(q=jnp.zeros((4, 0, 128), E4M3)), "h is 0 in q"),
        (lambda: prompt(k=jnp.zeros((6, 64), E4M3)), r"k is float8_e4m3fn \(6, 64\)"),
        (lambda: prompt(k_scale=jnp.zeros(5)), r"k_scale is float32 \(5,\): expected .*\(6,\)"),
        (lambda: prompt(weights=jnp.zeros((2, 4))), r"weights is float32 \(2, 4\)"),
        (lambda: prompt(low=jnp.zeros(4)), r"low is float32 \(4,\): expected int32"),
        (lambda: prompt(high=jnp.zeros(3, jnp.int32)), r"high is int32 \(3,\)"),
        (lambda: prompt(backend="cuda"), "backend is 'cuda': use one of"),
        (lambda: prompt(backend="mosaic_gpu"), "h is 2: mosaic_gpu takes 32, 64, 128"),
        (lambda: decoding(q=jnp.zeros((2, 5, 2, 128), E4M3)), r"t is 5 in q .*: expected 1 to 4"),
        (lambda: decoding(k_cache=jnp.zeros((3, 64, 132), jnp.uint8)), r"k_cache is uint8 \(3, 6"),
        (lambda: decoding(k_cache=jnp.zeros((3, 8320), jnp.uint8)), r"expected uint8 \(3, 8448\)"),
        (lambda: decoding(weights=jnp.zeros((2, 2))), r"weights is float32 \(2, 2\)"),
        (lambda: decoding(block_table=jnp.zeros((1, 2), jnp.int32)), "block_table is int32"),
        (lambda: decoding(lengths=jnp.array([3, 129], jnp.int32)), r"lengths\[1\] is 129: .* 128"),
        (lambda: decoding(lengths=jnp.array([-1, 0], jnp.int32)), r"lengths\[0\] is -1: .* 0 to"),
        (lambda: decoding(backend="mosaic_gpu"), "h is 2: mosaic_gpu takes"),
        (lambda: index_topk(jnp.zeros(4), -1), "k is -1: expected 0 or more"),
        (lambda: index_topk(jnp.zeros(4, jnp.int32), 1), r"logits is int32 \(4,\)"),
        (lambda: hadamard(jnp.zeros((2, 64))), r"x is float32 \(2, 64\): expected .*\(2, 128\)"),
        (lambda: quantize_index(jnp.zeros((2, 128), jnp.int8)), r"x is int8 \(2, 128\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lengths_that_are_traced():
    """Too long ones then read no further than the table does."""
    operands, keys = paged(2, 2, 4, [128, 70], 2)
    too_long = operands[4].at[0].set(500)
    found = jax.jit(paged_index_logits)(*operands[:4], too_long)
    expected = true_paged_logits(operands, keys)
    assert_logits(found[1], expected[1])
    assert np.isfinite(found[0]).all()


def test_not_differentiable():
    q, k, k_scale, weights = draw(4, 6, 2)
    low = jnp.zeros(4, jnp.int32)
    with pytest.raises(TypeError, match="the indexer's logits are not differentiable"):
        jax.grad(lambda w: index_logits(q, k, k_scale, w, low, low + 3).sum())(weights)
    operands, _ = paged(2, 1, 2, [3, 70], 2)
    run = functools.partial(paged_index_logits, operands[0], operands[1])
    with pytest.raises(TypeError, match="the indexer's logits are not differentiable"):
        jax.grad(lambda w: run(w, *operands[3:])[0, 0, 0])(operands[2])
