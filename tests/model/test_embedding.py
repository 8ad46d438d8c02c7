"""The embedding's gradient: right, in float32, and of tokens that lie in many blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.embedding import BLOCK, look_up, summed_by_token

VOCABULARY, WIDTH = 11, 3
DRAWN = {
    "none": [],
    "one": [4],
    "all alike": [7] * (2 * BLOCK + 5),
    "whole blocks alike": [0] * BLOCK + [10] * 2 * BLOCK,
    "every token": list(range(VOCABULARY)) * 40,
    "first and last": [10, 0] * 100,
}


def added_up(rows, tokens):
    found = np.zeros((VOCABULARY, WIDTH))
    np.add.at(found, np.asarray(tokens, int), np.asarray(rows, np.float64))
    return found


@pytest.mark.parametrize("tokens", [*DRAWN.values(), None], ids=[*DRAWN, "random"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_equal_tokens_are_added_up(tokens, dtype):
    rng = np.random.default_rng(0)
    if tokens is None:
        tokens = rng.zipf(1.5, 900) % VOCABULARY
    tokens = rng.permutation(np.array(tokens, np.int32))
    rows = jnp.asarray(rng.normal(size=(len(tokens), WIDTH)), dtype)
    found = jax.jit(summed_by_token, static_argnums=2)(rows, jnp.asarray(tokens), VOCABULARY)
    assert (found.shape, found.dtype) == ((VOCABULARY, WIDTH), jnp.float32)
    np.testing.assert_allclose(found, added_up(rows, tokens), rtol=1e-5, atol=2e-5)
    unseen = np.setdiff1d(np.arange(VOCABULARY), tokens)
    assert not np.asarray(found)[unseen].any()


def test_gradient_is_that_of_indexing():
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(VOCABULARY, WIDTH)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (4, 90)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(4, 90, WIDTH)), jnp.float32)

    def loss(look_up, table):
        return (look_up(table) ** 2 * weights).sum()

    found = jax.grad(lambda t: loss(lambda t: look_up(t, tokens, jnp.float32), t))(table)
    expected = jax.grad(lambda t: loss(lambda t: t[tokens], t))(table)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    short = look_up(table, tokens, jnp.bfloat16)
    assert short.dtype == jnp.bfloat16
    assert (short == table[tokens].astype(jnp.bfloat16)).all()


def test_nothing_is_added_in_memory():
    """No scatter that adds: on a GPU its order would be anyone's guess."""
    tokens = jnp.zeros((2, 300), jnp.int32)
    gradient = jax.grad(lambda table: look_up(table, tokens, jnp.float32).sum())
    jaxpr = str(jax.make_jaxpr(gradient)(jnp.ones((VOCABULARY, WIDTH))))
    assert "scatter" in jaxpr
    assert "scatter-add" not in jaxpr
    assert "scatter_add" not in jaxpr
