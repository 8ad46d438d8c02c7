"""Sparse MLA against numpy in float64, on tokens that lie among NaN."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_sparse
from pallas_kernels.latent_cache import dequantize_latent_cache, quantize_latent_cache
from pallas_kernels.lightning_indexer import index_topk
from pallas_kernels.mla_sparse import mla_sparse_decode, mla_sparse_prefill

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")
SCALE = 0.1352
INVALID = [-1, -5, 2147480000]


def draw(shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=(*shape, 576)), jnp.bfloat16)


def truth(q, tokens, indices):
    """Of queries [..., h, 576] and indices [..., k]; one at a time."""
    q, tokens = np.asarray(q, np.float64), np.asarray(tokens, np.float64)
    out = np.zeros((*q.shape[:-1], 512))
    lse = np.full(q.shape[:-1], np.inf)
    for at in np.ndindex(q.shape[:-2]):
        own = np.asarray(indices)[at]
        own = own[(own >= 0) & (own < len(tokens))]
        if len(own):
            scores = q[at] @ tokens[own].T * SCALE
            lse[at] = np.logaddexp.reduce(scores, axis=1)
            out[at] = np.exp(scores - lse[at][:, None]) @ tokens[own][:, :512]
    return out, lse


def assert_near(found, expected, rtol=2**-8):
    """Out is bfloat16, so right to half a unit in its last place; lse to float32."""
    out, lse = (np.asarray(x, np.float64) for x in found)
    np.testing.assert_allclose(out, expected[0], rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=1e-5)


def choose(shape, count, k, seed=0):
    """k indices below count for each query, some of them invalid or twice there; the second query
    has none."""
    rng = np.random.default_rng([seed, count, k])
    found = rng.integers(0, count, (math.prod(shape), k), np.int32)
    invalid = rng.random(found.shape) < 0.3
    found[invalid] = rng.choice(INVALID, invalid.sum())
    found[1:2] = -1
    found[0, :2] = 0
    return found.reshape(*shape, k)


def poisoned(tokens, indices):
    """NaN wherever no index leads."""
    tokens = np.array(tokens.astype(jnp.float32))
    chosen = np.unique(indices[(indices >= 0) & (indices < len(tokens))])
    tokens[np.setdiff1d(np.arange(len(tokens)), chosen)] = np.nan
    assert np.isnan(tokens).any()
    return jnp.asarray(tokens, jnp.bfloat16)


@pytest.mark.parametrize(("t", "h", "s", "k"), [(9, 3, 400, 20), (2, 16, 300, 64), (3, 1, 90, 1)])
def test_prefill(t, h, s, k):
    q, indices = draw((t, h)), choose((t,), s, k)
    kv = poisoned(draw((s,), 1), indices)
    found = jax.jit(functools.partial(mla_sparse_prefill, scale=SCALE))(q, kv, indices)
    assert found[0].dtype == jnp.bfloat16
    assert found[1].dtype == jnp.float32
    assert_near(found, truth(q, kv, indices))
    assert np.isposinf(found[1][1]).all()


def test_a_few_queries_at_a_time(monkeypatch):
    q, kv, indices = draw((7, 2)), draw((50,), 1), choose((7,), 50, 65)
    whole = mla_sparse_prefill(q, kv, indices, scale=SCALE)
    monkeypatch.setattr(mla_sparse, "MOST_GATHERED", 3 * 128 * 576)
    parts = mla_sparse_prefill(q, kv, indices, scale=SCALE)
    assert_near(parts, truth(q, kv, indices))
    np.testing.assert_array_equal(parts[0], whole[0])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("b", "t", "h", "k"), [(3, 2, 4, 70), (1, 1, 128, 64), (2, 4, 1, 5)])
def test_decode(b, t, h, k, fp8):
    q, indices = draw((b, t, h)), choose((b, t), 5 * 64, k)
    cache = poisoned(draw((5 * 64,), 1), indices).reshape(5, 64, 576)
    if fp8:
        cache = quantize_latent_cache(cache)
    tokens = dequantize_latent_cache(cache) if fp8 else cache
    run = jax.jit(functools.partial(mla_sparse_decode, scale=SCALE))
    found, expected = run(q, cache, indices), truth(q, tokens.reshape(-1, 576), indices)
    assert found[0].shape == (b, t, h, 512)
    assert_near(found, expected)


def test_garbage_in_tokens_of_an_fp8_cache_that_nobody_asks_for():
    indices = np.array([[[3, -1, 64, 3]]], np.int32)
    cache = np.full((2, 64, 656), 0xFF, np.uint8)
    own = np.asarray(quantize_latent_cache(draw((2, 64), 2)))
    for index in (3, 64):
        cache.reshape(-1, 656)[index] = own.reshape(-1, 656)[index]
    q = draw((1, 1, 4))
    found = mla_sparse_decode(q, jnp.asarray(cache), jnp.asarray(indices), scale=SCALE)
    tokens = dequantize_latent_cache(jnp.asarray(own)).reshape(-1, 576)
    assert_near(found, truth(q, tokens, indices))


def test_an_index_that_stands_there_twice_counts_twice():
    q, kv = draw((1, 4)), draw((8,), 1)
    out, lse = mla_sparse_prefill(q, kv, jnp.array([[2, 5, 2]], jnp.int32), scale=SCALE)
    scores = np.asarray(q, np.float64)[0] @ np.asarray(kv, np.float64)[[2, 5]].T * SCALE
    weights = np.exp(scores) * [2, 1]
    np.testing.assert_allclose(lse[0], np.log(weights.sum(1)), rtol=1e-6)
    expected = weights @ np.asarray(kv, np.float64)[[2, 5], :512] / weights.sum(1)[:, None]
    np.testing.assert_allclose(np.asarray(out[0], np.float64), expected, rtol=2**-8, atol=1e-6)


def test_all_tokens_chosen_is_dense_attention():
    """Through the indexer's choice: with k above every length it is causal attention."""
    t = 40
    q, kv = draw((t, 8)), draw((t,), 1)
    seen = jnp.tril(jnp.ones((t, t), bool))
    logits = jax.random.normal(jax.random.key(0), (t, t))
    indices = index_topk(jnp.where(seen, logits, -jnp.inf), 64)
    found = mla_sparse_prefill(q, kv, indices, scale=SCALE)
    wide, keys = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    scores = np.einsum("thw,sw->ths", wide, keys) * SCALE
    scores = np.where(np.asarray(seen)[:, None], scores, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=-1)
    out = np.einsum("ths,sc->thc", np.exp(scores - lse[..., None]), keys[:, :512])
    assert_near(found, (out, lse))


def test_order_does_not_matter():
    q, kv, indices = draw((3, 2)), draw((100,), 1), choose((3,), 100, 30)
    found = mla_sparse_prefill(q, kv, indices, scale=SCALE)
    turned = mla_sparse_prefill(q, kv, indices[:, ::-1], scale=SCALE)
    assert_near(turned, truth(q, kv, indices))
    np.testing.assert_allclose(found[1], turned[1], rtol=1e-6)


def test_large_scores():
    """Softmax after the largest is taken off: no overflow."""
    q, kv = draw((2, 2)) * 40, draw((30,), 1) * 40
    indices = jnp.tile(jnp.arange(30, dtype=jnp.int32), (2, 1))
    assert_near(mla_sparse_prefill(q, kv, indices, scale=SCALE), truth(q, kv, indices))


def test_the_reference_has_gradients():
    """Of queries and tokens, none from invalid indices."""
    q, kv = draw((2, 2)), draw((20,), 1)
    indices = jnp.array([[3, -1, 7, 19], [-1, -1, -1, -1]], jnp.int32)

    def dense(q, kv):
        rows = kv.astype(jnp.float32)[jnp.array([3, 7, 19])]
        scores = jnp.einsum("hw,kw->hk", q[0].astype(jnp.float32), rows) * SCALE
        return (jax.nn.softmax(scores) @ rows[:, :512]).sum()

    def sparse(q, kv):
        out = mla_sparse_prefill(q, kv, indices, scale=SCALE)[0]
        return out.astype(jnp.float32).sum()

    for found, expected in zip(
        jax.grad(sparse, (0, 1))(q, kv), jax.grad(dense, (0, 1))(q, kv), strict=True
    ):
        wide, true = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        assert np.linalg.norm(wide - true) <= 1e-2 * np.linalg.norm(true)


@pytest.mark.parametrize(("t", "s", "k"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_empty(t, s, k):
    indices = jnp.zeros((t, k), jnp.int32)
    out, lse = mla_sparse_prefill(draw((t, 3)), draw((s,)), indices, scale=SCALE)
    assert out.shape == (t, 3, 512)
    assert not np.asarray(out, np.float32).any()
    assert np.isposinf(lse).all()
    cache = draw((s // 4, 64))
    out, lse = mla_sparse_decode(draw((t, 1, 3)), cache, indices[:, None], scale=SCALE)
    assert out.shape == (t, 1, 3, 512)
    assert np.isposinf(lse).all()


def prefill(**changes):
    operands = dict(q=draw((2, 3)), kv=draw((9,)), indices=jnp.zeros((2, 4), jnp.int32), scale=1.0)
    return mla_sparse_prefill(**(operands | changes))


def decode(**changes):
    operands = dict(q=draw((2, 1, 3)), cache=draw((2, 64)), scale=1.0)
    operands["indices"] = jnp.zeros((2, 1, 4), jnp.int32)
    return mla_sparse_decode(**(operands | changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prefill(q=jnp.zeros((2, 3, 576))), r"q is float32 \(2, 3, 576\): expected bfloat"),
        (lambda: prefill(q=draw((2, 3))[..., :512]), r"\(2, 3, 512\): expected .*\(2, 3, 576\)"),
        (lambda: prefill(kv=draw((9,))[:, :512]), r"kv is bfloat16 \(9, 512\)"),
        (
            lambda: prefill(indices=jnp.zeros((3, 4), jnp.int32)),
            r"indices is int32 \(3, 4\): .*2, 4",
        ),
        (
            lambda: prefill(indices=jnp.zeros((2, 4))),
            r"indices is float32 \(2, 4\): expected int32",
        ),
        (lambda: prefill(scale=0.0), "scale is 0.0: expected a finite number above 0"),
        (lambda: prefill(scale=float("nan")), "scale is nan"),
        (lambda: prefill(backend="cuda"), "backend is 'cuda'"),
        (lambda: prefill(backend="mosaic_gpu"), "backend is 'mosaic_gpu': its kernels need a Hop"),
        (lambda: decode(q=draw((2, 3))), r"q is bfloat16 \(2, 3, 576\): expected .*\[b, t, h, 576"),
        (lambda: decode(cache=draw((2, 32))), r"cache is bfloat16 \(2, 32, 576\)"),
        (
            lambda: decode(cache=jnp.zeros((2, 64, 576), jnp.uint8)),
            r"expected uint8 \(2, 64, 656\)",
        ),
        (lambda: decode(indices=jnp.zeros((2, 4), jnp.int32)), r"indices is int32 \(2, 4\)"),
        (lambda: decode(backend="mosaic_gpu"), "backend is 'mosaic_gpu'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
