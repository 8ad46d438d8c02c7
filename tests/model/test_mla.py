"""Naive, absorbed, paged and sparse attention are one function, and so is a prompt by chunks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Model, Yarn
from dsjax.model.attention import plan_decode
from dsjax.model.mla import Mla
from dsjax.model.rope import rotation, softmax_scale
from pallas_kernels import (
    dequantize_latent_cache,
    mla_decode,
    mla_sparse_prefill,
    plan_mla_decode,
)
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
    """Absorbed attention of new tokens at start, ... to layer 1, which they are written to."""
    turn = rotation(mla.config, (start + jnp.arange(x.shape[1]))[None])
    lengths = jnp.full(x.shape[:1], start + x.shape[1])
    return mla.absorbed(x, turn, cache, 1, lengths)


def decoded(mla: Mla, x: jax.Array, pieces: list[int]) -> tuple[jax.Array, jax.Array]:
    cache = jnp.zeros((3, x.shape[0], TIME + 4, mla.config.latent_dim))
    out, start = [], 0
    for size in pieces:
        piece, cache = step(mla, x[:, start : start + size], cache, jnp.int32(start))
        out.append(piece)
        start += size
    return jnp.concatenate(out, axis=1), cache


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=4e-6 * scale)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pieces", [[1] * TIME, [4, 4, 1]], ids=["one by one", "several"])
def test_absorbed_equals_naive(case, pieces):
    config = replace(CONFIG, **CASES[case])
    mla, (x, turn) = attention(config), inputs(config)
    found, cache = decoded(mla, x, pieces)
    expected, latents = naive(mla, x, turn)
    assert_close(found, expected)
    assert_close(cache[1, :, :TIME], latents)
    assert not np.asarray(cache[jnp.array([0, 2])]).any()
    assert not np.asarray(cache[1, :, TIME:]).any()


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
    with jax.default_matmul_precision("float32"):  # a GPU's own choice has 10 bits
        cached, low = naive(mla, x, turn)[1], x @ mla.kv_down[...]
    assert cached.shape == (BATCH, TIME, CONFIG.latent_dim)
    latent = cached[..., : CONFIG.kv_lora_rank] / mla.kv_norm[...]
    np.testing.assert_allclose(jnp.mean(latent**2, axis=-1), 1.0, rtol=1e-3)
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
    clean = jnp.zeros((2, BATCH, TIME + 4, CONFIG.latent_dim))
    expected = step(mla, x, clean, jnp.int32(0))[0]
    for garbage in (1e4, jnp.nan):
        found = step(mla, x, clean + garbage, jnp.int32(0))[0]
        np.testing.assert_array_equal(found, expected)


def test_what_a_cache_has_no_room_for_is_dropped():
    mla, (x, _) = attention(CONFIG), inputs(CONFIG)
    cache = jnp.zeros((2, BATCH, TIME - 2, CONFIG.latent_dim))
    _, found = step(mla, x, cache, jnp.int32(0))
    _, expected = step(mla, x[:, :-2], cache, jnp.int32(0))
    assert_close(found, expected)


PUBLISHED = replace(CONFIG, kv_lora_rank=512, qk_rope_dim=64, qk_nope_dim=128, v_dim=128, heads=3)
STORED = {"bf16": ((64, 576), jnp.bfloat16), "fp8": ((64, 656), jnp.uint8)}
TOKENS, PAGES, SPARE = 150, 3, 1  # two pages and a bit


def published() -> tuple[Mla, jax.Array, jax.Array]:
    mla = attention(PUBLISHED)
    mla.q[...] /= 4  # so that the queries attend to many tokens
    x = jax.random.normal(jax.random.key(1), (BATCH, TOKENS, PUBLISHED.dim), jnp.bfloat16)
    return mla, x, rotation(PUBLISHED, jnp.arange(TOKENS)[None])


def scattered(form: str) -> tuple[jax.Array, jax.Array]:
    """An unwritten paged cache, of NaN and of what is NaN in FP8, and a table in no order."""
    shape, dtype = STORED[form]
    count = BATCH * PAGES + SPARE
    garbage = jnp.nan if form == "bf16" else 0xFF
    table = np.random.default_rng(5).permutation(count)[: BATCH * PAGES].reshape(BATCH, PAGES)
    return jnp.full((count, *shape), garbage, dtype), jnp.asarray(table, jnp.int32)


@jax.jit
def paged_step(
    mla: Mla, x: jax.Array, cache: jax.Array, table: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    t = x.shape[1]
    turn = rotation(mla.config, (lengths - t)[:, None] + jnp.arange(t))
    plan = plan_mla_decode(lengths, queries=t, heads=mla.config.heads)
    return mla.paged(x, turn, cache, table, lengths, plan)


def paged(mla: Mla, x: jax.Array, form: str, pieces: list[int]) -> tuple[jax.Array, ...]:
    """Results of x, the cache and its table."""
    (cache, table), out, start = scattered(form), [], 0
    for size in pieces:
        lengths = jnp.full((len(x),), start + size, jnp.int32)
        piece, cache = paged_step(mla, x[:, start : start + size], cache, table, lengths)
        out.append(piece)
        start += size
    return jnp.concatenate(out, axis=1), cache, table


@jax.jit
def sparse(mla: Mla, x: jax.Array, cache: jax.Array, table: jax.Array) -> jax.Array:
    """Sparse attention, as decoding does it, to all tokens that a query may see."""
    position = jnp.arange(PAGES * 64)
    slots = table[:, position // 64] * 64 + position % 64
    seen = position <= jnp.arange(x.shape[1])[:, None]
    chosen = jnp.where(seen, slots[:, None], -1)[..., ::-1]
    turn, lengths = rotation(mla.config, position[None, : x.shape[1]]), jnp.full(len(x), TOKENS)
    return mla.paged(x, turn, cache, table, lengths.astype(jnp.int32), chosen=chosen)[0]


@jax.jit
def sparse_prompt(mla: Mla, x: jax.Array, turn: jax.Array) -> jax.Array:
    """The same as prefill does it."""
    seen = jnp.tri(TOKENS, dtype=bool)
    chosen = jnp.where(seen, jnp.arange(TOKENS, dtype=jnp.int32), -1)
    scale = softmax_scale(mla.config)
    q, latents = mla._absorbed_queries(x, turn), mla.latents(x, turn)
    rows = [
        mla_sparse_prefill(*row, chosen, scale=scale)[0] for row in zip(q, latents, strict=True)
    ]
    return mla._project_latents_out(jnp.stack(rows))


@jax.jit
def contiguous(mla: Mla, x: jax.Array, turn: jax.Array, cache: jax.Array) -> tuple:
    """Absorbed attention of x to the last layer, whose first positions it is written to."""
    lengths = jnp.full(x.shape[:1], x.shape[1], jnp.int32)
    plan = plan_decode(mla.config, cache, lengths, x.shape[1])
    return mla.absorbed(x, turn, cache, len(cache) - 1, lengths, plan)


def assert_same(found: jax.Array, expected: jax.Array, units: float = 2) -> None:
    """Within so many roundings to BF16 of the largest number."""
    assert found.dtype == expected.dtype == jnp.bfloat16
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    atol = units * 2**-8 * np.nanmax(np.abs(expected))
    np.testing.assert_allclose(found, expected, atol=atol)


def assert_caches(found: jax.Array, expected: jax.Array) -> None:
    """Bits on a CPU, where a row's products do not depend on how many rows there are."""
    if jax.default_backend() == "cpu":
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint8) for x in (found, expected)))
    elif found.dtype == jnp.bfloat16:
        assert_same(found, expected, units=1)
    else:
        assert_same(*map(dequantize_latent_cache, (found, expected)), units=20)


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_all_forms_are_one_function_at_the_published_widths():
    mla, x, turn = published()
    expected = naive(mla, x, turn)[0]
    whole, cache, table = paged(mla, x, "bf16", [TOKENS])
    pieces, same_cache, _ = paged(mla, x, "bf16", [126, 1, 3, 20])
    assert_caches(cache, same_cache)
    for found in (whole, pieces, sparse(mla, x, cache, table), sparse_prompt(mla, x, turn)):
        assert_same(found, expected)
        assert relative_error(found, expected) < 6e-3


@pytest.mark.parametrize("room", [191, 192], ids=["rows", "pages"])
def test_a_contiguous_cache_is_one_of_all_layers(room):
    mla, x, turn = published()
    free = jnp.full((3, BATCH, room, 576), jnp.nan, jnp.bfloat16)
    found, cache = contiguous(mla, x, turn, free)
    expected, latents = naive(mla, x, turn)
    assert_same(found, expected, units=3)
    assert_same(cache[2, :, :TOKENS], latents, units=1)
    assert np.isnan(np.asarray(cache[:2], np.float32)).all()
    assert np.isnan(np.asarray(cache[2, :, TOKENS:], np.float32)).all()


@jax.jit
def unwritten(mla: Mla, x: jax.Array, turn: jax.Array, cache: jax.Array, table: jax.Array):
    """Paged attention to a cache as it is."""
    q, lengths = mla._absorbed_queries(x, turn), jnp.full(len(x), TOKENS, jnp.int32)
    return mla._project_latents_out(
        mla_decode(q, cache, table, lengths, scale=softmax_scale(mla.config))[0]
    )


def test_fp8_cache_is_the_bf16_cache_of_rounded_latents():
    mla, x, turn = published()
    found, cache, table = paged(mla, x, "fp8", [63, 64, 1, 22])
    assert_same(found, sparse(mla, x, cache, table), units=1)
    wide = jax.jit(dequantize_latent_cache)(cache)
    assert_same(found, unwritten(mla, x, turn, wide, table), units=1)
    # Rounding to e4m3 alone is 2.6 % of what is rounded.
    assert 0.02 < relative_error(found, naive(mla, x, turn)[0]) < 0.045


@pytest.mark.parametrize(
    ("dtype", "room", "paged"),
    [(jnp.bfloat16, 128, True), (jnp.bfloat16, 100, False), (jnp.float32, 128, False)],
)
def test_contiguous_cache_is_paged_where_it_can_be(dtype, room, paged, monkeypatch):
    mla, x, turn = published()
    taken = []

    def attend(self, x, turn, cache, table, lengths, plan):
        taken.append((cache.shape, table.tolist(), plan))
        return x, cache

    monkeypatch.setattr(Mla, "paged", attend)
    cache, lengths = jnp.zeros((3, BATCH, room, 576), dtype), jnp.full((BATCH,), 9)
    plan = plan_decode(PUBLISHED, cache, lengths, 9)
    x, turn = x[:, :9].astype(dtype), turn[:, :9]
    assert mla.absorbed(x, turn, cache, 1, lengths, plan)[1].shape == cache.shape
    assert (plan is not None) == paged
    assert taken == ([((12, 64, 576), [[4, 5], [6, 7]], plan)] if paged else [])


@pytest.mark.parametrize("form", STORED)
def test_paged_writes_its_own_tokens_alone(form):
    """Two requests, of length 65 and of none."""
    mla, x, _ = published()
    expected, cache, table = paged(mla, x, form, [TOKENS])
    before, _ = scattered(form)
    lengths = jnp.array([65, 0], jnp.int32)
    found, after = paged_step(mla, x[:, :65], before, table, lengths)
    assert_same(found[0], expected[0, :65])
    assert not np.asarray(found[1]).any()
    first, second, _ = np.asarray(table)[0]
    wanted = before.at[first].set(cache[first]).at[second, 0].set(cache[second, 0])
    assert_caches(after, wanted)


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("chunk", [64, 50])
def test_a_prompt_by_chunks_is_the_whole_prompt(form, chunk):
    mla, x, turn = published()
    sizes = [min(chunk, TOKENS - start) for start in range(0, TOKENS, chunk)]
    found, cache, table = paged(mla, x, form, sizes)
    whole, same_cache, _ = paged(mla, x, form, [TOKENS])
    assert_caches(cache, same_cache)
    assert_same(found, whole)
    if form == "bf16":
        expected, latents = naive(mla, x, turn)
        assert_same(found, expected)
        kept = cache[table].reshape(BATCH, PAGES * 64, 576)
        assert_same(kept[:, :TOKENS], latents, units=1)


def test_prompts_of_several_lengths_by_chunks():
    """A shorter prompt's last chunk begins with tokens of the one before."""
    mla, x, turn = published()
    (cache, table), found = scattered("bf16"), np.zeros(x.shape, np.float32)
    prompts, expected = np.array([TOKENS, 97]), naive(mla, x, turn)[0]
    for end in (64, 128, 192):
        ends = np.minimum(end, prompts)
        at = (ends - 64)[:, None] + np.arange(64)
        row = np.arange(BATCH)[:, None]
        out, cache = paged_step(mla, x[row, at], cache, table, jnp.asarray(ends, jnp.int32))
        found[row, at] = out
    for row, length in enumerate(prompts):
        assert_same(jnp.bfloat16(found[row, :length]), expected[row, :length])
        assert not found[row, length:].any()


def test_paged_refuses_other_models():
    mla, (x, turn) = attention(CONFIG), inputs(CONFIG)
    cache, table = scattered("bf16")
    lengths = jnp.full((BATCH,), TIME, jnp.int32)
    with pytest.raises(ValueError, match=r"down is bfloat16 .* expected bfloat16 \(2, 9, 576\)"):
        mla.paged(x.astype(jnp.bfloat16), turn, cache, table, lengths)
    with pytest.raises(ValueError, match=r"down is float32"):
        mla.paged(x, turn, cache, table, lengths)
