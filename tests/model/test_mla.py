"""Naive and absorbed attention are one function."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Model, Yarn
from dsjax.model.mla import Mla
from dsjax.model.rope import rotation
from tests.tiny import CONFIG, randomise

BATCH, TIME = 2, 9
CASES = {
    "no q-LoRA": {},
    "q-LoRA, wide values, 3 heads": {"q_lora_rank": 12, "v_dim": 20, "heads": 3},
    "narrow values, 5 heads, yarn": {
        "v_dim": 4, "heads": 5, "q_lora_rank": 7, "yarn": Yarn(factor=8.0, original_context=16)
    },
    "one head, yarn that lengthens": {
        "heads": 1, "yarn": Yarn(factor=4.0, original_context=32, mscale_all_dim=0.0)
    },
}  # fmt: skip


def attention(config: Model) -> Mla:
    return randomise(
        nnx.eval_shape(lambda: Mla(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(jnp.float32)))
    )


def inputs(config: Model) -> tuple[jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, config.dim))
    return x, rotation(config, jnp.arange(TIME)[None])


@jax.jit
def naive(mla: Mla, x: jax.Array, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mla.naive(x, turn)


@jax.jit
def step(mla: Mla, x: jax.Array, cache: jax.Array, start: jax.Array) -> tuple:
    """Absorbed attention of new tokens at start, ... against a cache that they are written to."""
    positions = start + jnp.arange(x.shape[1])
    turn = rotation(mla.config, positions[None])
    cache = jax.lax.dynamic_update_slice(cache, mla.latents(x, turn), (0, start, 0))
    visible = jnp.arange(cache.shape[1]) <= positions[:, None]
    visible = jnp.broadcast_to(visible, (x.shape[0], *visible.shape))
    return mla.absorbed(x, turn, cache, visible), cache


def decoded(mla: Mla, x: jax.Array, pieces: list[int], capacity: int = TIME + 4) -> jax.Array:
    cache = jnp.zeros((x.shape[0], capacity, mla.config.latent_dim))
    out, start = [], 0
    for size in pieces:
        piece, cache = step(mla, x[:, start : start + size], cache, jnp.int32(start))
        out.append(piece)
        start += size
    return jnp.concatenate(out, axis=1)


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=4e-6 * scale)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [[1] * TIME, [4, 4, 1]], ids=["one by one", "several"])
def test_absorbed_equals_naive(case, pieces):
    config = replace(CONFIG, **CASES[case])
    mla, (x, turn) = attention(config), inputs(config)
    assert_close(decoded(mla, x, pieces), naive(mla, x, turn)[0])


def test_naive_equals_attention_written_out_for_one_query():
    config = replace(CONFIG, heads=3, v_dim=5)
    mla, (x, turn) = attention(config), inputs(config)
    found, cached = naive(mla, x, turn)
    n, rank, at = config.qk_nope_dim, config.kv_lora_rank, 6
    nope, rope = (np.asarray(part, np.float64)[0, at] for part in mla.queries(x, turn))
    latents = np.asarray(cached, np.float64)[0, : at + 1]
    kv = np.einsum("tc,chy->thy", latents[:, :rank], np.asarray(mla.kv_up[...], np.float64))
    scores = np.einsum("hn,thn->ht", nope, kv[..., :n]) + rope @ latents[:, rank:].T
    weights = np.exp(scores / np.sqrt(config.qk_dim))
    weights /= weights.sum(axis=1, keepdims=True)
    attended = np.einsum("ht,thv->hv", weights, kv[..., n:])
    expected = np.einsum("hv,hvd->d", attended, np.asarray(mla.out[...], np.float64))
    np.testing.assert_allclose(found[0, at], expected, rtol=1e-4, atol=1e-5)


def test_latent_is_normalised_and_comes_before_the_key():
    mla, (x, turn) = attention(CONFIG), inputs(CONFIG)
    cached = naive(mla, x, turn)[1]
    assert cached.shape == (BATCH, TIME, CONFIG.latent_dim)
    latent = cached[..., : CONFIG.kv_lora_rank] / mla.kv_norm[...]
    np.testing.assert_allclose(jnp.mean(latent**2, axis=-1), 1.0, rtol=1e-3)
    low = x @ mla.kv_down[...]
    np.testing.assert_allclose(cached[:, 0, CONFIG.kv_lora_rank :],
                               low[:, 0, CONFIG.kv_lora_rank :], atol=1e-5)  # fmt: skip


def test_later_tokens_do_not_change_earlier_results():
    mla, (x, turn) = attention(CONFIG), inputs(CONFIG)
    changed = naive(mla, x.at[:, 5:].add(3.0), turn)[0]
    expected = naive(mla, x, turn)[0]
    np.testing.assert_array_equal(changed[:, :5], expected[:, :5])
    assert jnp.abs(changed[:, 5:] - expected[:, 5:]).min() > 0


def test_what_lies_in_unused_cache_positions_does_not_matter():
    mla, (x, _) = attention(CONFIG), inputs(CONFIG)
    clean = jnp.zeros((BATCH, TIME + 4, CONFIG.latent_dim))
    expected = step(mla, x, clean, jnp.int32(0))[0]
    for garbage in (1e4, jnp.nan):
        found = step(mla, x, clean + garbage, jnp.int32(0))[0]
        np.testing.assert_array_equal(found, expected)
