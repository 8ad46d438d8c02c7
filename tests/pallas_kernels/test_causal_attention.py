"""Causal attention against a plain float64 softmax, over block borders and odd lengths."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_attention


def plain(q, k, v, scale):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bihq,bjhq->bhij", q, k) * scale
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, keepdims=True), v)


def inputs(t, b=2, h=3, qk=24, width=16, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k = (jax.random.normal(key, (b, t, h, qk), dtype) for key in keys[:2])
    v, grad = (jax.random.normal(key, (b, t, h, width), dtype) for key in keys[2:])
    return q, k, v, grad


@pytest.mark.parametrize("t", [1, 5, 512, 513, 1100])
def test_reference(t):
    q, k, v, _ = inputs(t, b=1, h=2)
    out = causal_attention(q, k, v, scale=0.3, backend="reference")
    np.testing.assert_allclose(out, plain(q, k, v, 0.3), rtol=1e-4, atol=1e-5)


def test_blocks_have_the_gradient_of_one_piece():
    q, k, v, grad = inputs(600, b=1, h=2)

    def whole(q, k, v):
        scores = jnp.einsum("bihq,bjhq->bhij", q, k, precision="highest") * 0.3
        scores = jnp.where(jnp.tri(600, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhij,bjhv->bihv", jax.nn.softmax(scores), v, precision="highest")

    expected = jax.vjp(whole, q, k, v)[1](grad)
    found = jax.vjp(lambda *x: causal_attention(*x, scale=0.3), q, k, v)[1](grad)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_refuses():
    q, k, v, _ = inputs(4)
    with pytest.raises(ValueError, match="differ in more than the width"):
        causal_attention(q, k[:, :3], v, scale=1.0)
    with pytest.raises(ValueError, match="backend is 'flash'"):
        causal_attention(q, k, v, scale=1.0, backend="flash")


@pytest.mark.parametrize(
    ("card", "qk", "width", "takes"),
    [(9.0, 192, 128, True), (8.9, 192, 128, False), (8.0, 96, 64, True), (7.5, 96, 64, False),
     (9.0, 64, 128, False), (0.0, 96, 64, False)],
)  # fmt: skip
def test_cudnn_is_chosen_where_the_card_takes_the_width(monkeypatch, card, qk, width, takes):
    module = sys.modules[causal_attention.__module__]
    monkeypatch.setattr(module, "compute_capability", lambda: card)
    q, _, v, _ = inputs(8, qk=qk, width=width, dtype=jnp.bfloat16)
    assert module._cudnn_takes(q, v) is takes
    assert not module._cudnn_takes(q.astype(jnp.float32), v)


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "qk", "width"), [(300, 192, 128), (1024, 96, 64), (64, 48, 32)])
def test_cudnn(t, qk, width):
    q, k, v, grad = inputs(t, qk=qk, width=width, dtype=jnp.bfloat16)
    results = []
    for backend in ("cudnn", "reference"):
        out, pull = jax.vjp(
            lambda *x, b=backend: causal_attention(*x, scale=0.1, backend=b), q, k, v
        )
        results.append([np.asarray(a, np.float32) for a in (out, *pull(grad))])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-2, atol=5e-2)
