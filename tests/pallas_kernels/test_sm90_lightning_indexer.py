"""The Hopper kernels of the lightning indexer: interpreted, lowered for CUDA, and on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_lightning_indexer, sm90_lightning_indexer_paged
from pallas_kernels.index_cache import PAGE_BYTES
from pallas_kernels.lightning_indexer import index_logits, paged_index_logits
from pallas_kernels.sm90_lightning_indexer import Cut
from pallas_kernels.sm90_lightning_indexer_paged import Cut as PagedCut
from tests.pallas_kernels.test_lightning_indexer import (
    assert_logits,
    draw,
    intervals,
    paged,
    true_logits,
    true_paged_logits,
)

ON_CARD = 2e-3
"""Of the size of a row's logits: the tensor core keeps about 14 bits of a sum of FP8 products."""


def interpreted(kernel, *operands, capsys, cut, sms=2):
    """The kernel's logits from `sms` CTAs; fails on a race."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = np.asarray(kernel(*operands, cut=cut, sms=sms, interpret=interpret))
    assert "RACE" not in "".join(capsys.readouterr())
    return found


PROMPTS = {
    "two warpgroups": (21, 320, 64, Cut(2, 2, 2, 8)),
    "odd sizes": (19, 70, 64, Cut(1, 1, 3, 6)),
    "narrow heads": (13, 200, 32, Cut(3, 1, 2, 8)),
    "wide heads": (5, 130, 128, Cut(2, 1, 2, 2)),
    "one query": (1, 64, 64, Cut(2, 1, 2, 16)),
}


@pytest.mark.parametrize(("t", "s", "h", "cut"), PROMPTS.values(), ids=PROMPTS)
def test_prompt(t, s, h, cut, capsys):
    operands = (*draw(t, s, h), *intervals(t, s))
    found = interpreted(sm90_lightning_indexer.logits, *operands, capsys=capsys, cut=cut)
    assert_logits(found, true_logits(*operands))


def causal(t, s):
    return jnp.zeros(t, jnp.int32), jnp.arange(s - t + 1, s + 1, dtype=jnp.int32)


def packed(t, s):
    """Prompts behind one another, s // t keys a query: each sees its own up to itself."""
    first = np.isin(np.arange(t), [t // 5, t // 2, t - 2])
    low = np.maximum.accumulate(np.where(first, np.arange(t), 0))
    return jnp.asarray(low * (s // t), jnp.int32), jnp.arange(1, t + 1, dtype=jnp.int32) * (s // t)


@pytest.mark.parametrize("cut", [Cut(2, 1, 2, 4), pytest.param(Cut(), marks=pytest.mark.slow)])
@pytest.mark.parametrize("bounds", [causal, packed])
def test_prompt_of_which_tiles_are_not_seen(bounds, cut, capsys):
    """More CTAs than work for some; NaN where no query looks."""
    t, s = 36, 400
    q, k, k_scale, weights = draw(t, s, 64)
    low, high = bounds(t, s)
    low, high = jnp.maximum(low, 3), jnp.minimum(high, 390)
    expected = true_logits(q, k, k_scale, weights, low, high)
    seen = (jnp.arange(s) >= 3) & (jnp.arange(s) < 390)
    k = jnp.where(seen[:, None], k.astype(jnp.float32), jnp.nan).astype(k.dtype)
    operands = q, k, jnp.where(seen, k_scale, jnp.nan), weights, low, high
    found = interpreted(sm90_lightning_indexer.logits, *operands, capsys=capsys, cut=cut, sms=3)
    assert_logits(found, expected)


def test_prompt_that_sees_nothing(capsys):
    operands = (*draw(9, 150, 64), jnp.full(9, 150, jnp.int32), jnp.zeros(9, jnp.int32))
    found = interpreted(
        sm90_lightning_indexer.logits, *operands, capsys=capsys, cut=Cut(2, 1, 2, 4)
    )
    assert np.isneginf(found).all()


SEQUENCES = {
    "uneven": (2, 64, [0, 200, 350, 1], 6, PagedCut(2, 4)),
    "one CTA has none": (1, 64, [60], 2, PagedCut(2, 4)),
    "three queries": (3, 64, [130, 2, 64], 3, PagedCut(3, 3)),
    "four of wide heads": (4, 128, [70, 0], 2, PagedCut(1, 2)),
    "narrow heads": (1, 32, [65, 0, 0, 640], 10, PagedCut(3, 6)),
    "no keys at all": (2, 64, [0, 0], 3, PagedCut(2, 4)),
}


@pytest.mark.parametrize(("t", "h", "lengths", "most", "cut"), SEQUENCES.values(), ids=SEQUENCES)
def test_pages(t, h, lengths, most, cut, capsys):
    operands, keys = paged(len(lengths), t, h, lengths, most)
    found = interpreted(sm90_lightning_indexer_paged.logits, *operands, capsys=capsys, cut=cut)
    assert_logits(found, true_paged_logits(operands, keys))


def test_many_sequences_a_cta(capsys):
    """Also with more CTAs than pages."""
    lengths = [0, 64, 1, 0, 128, 65, 0, 63, 192, 0]
    operands, keys = paged(len(lengths), 2, 64, lengths, 3)
    expected = true_paged_logits(operands, keys)
    kernel = functools.partial(
        interpreted, sm90_lightning_indexer_paged.logits, *operands, capsys=capsys
    )
    for sms in (1, 3, 13):
        assert_logits(kernel(cut=PagedCut(2, 2), sms=sms), expected)


def test_cuts():
    """Blocks of queries as large as leaves enough units; shared memory for wide queries."""
    sizes = [(1, 64), (128, 4096), (512, 65536), (4096, 65536)]
    assert [sm90_lightning_indexer.cut_for(*size, 132).queries for size in sizes] == [
        16,
        16,
        64,
        64,
    ]
    assert sm90_lightning_indexer.cut_for(4096, 8192, 132).queries == 64
    for columns in (32, 128, 256, 512):
        cut = sm90_lightning_indexer_paged.cut_for(columns)
        assert cut.stages % cut.warpgroups == 0
        assert cut.stages * PAGE_BYTES + 2 * columns * 132 < 220 << 10


def shape(dtype, *sizes):
    return jax.ShapeDtypeStruct(sizes, dtype)


E4M3, F32, I32 = jnp.float8_e4m3fn, jnp.float32, jnp.int32


@pytest.mark.parametrize(
    ("t", "s", "h"),
    [
        (4097, 65536, 64),
        (1, 100, 64),
        pytest.param(100, 1000, 32, marks=pytest.mark.slow),
        pytest.param(1, 7, 128, marks=pytest.mark.slow),
        pytest.param(8192, 131072, 64, marks=pytest.mark.slow),
    ],
)
def test_prompt_lowers_for_cuda(t, s, h):
    """The interpreter does not look at layouts, nor at how much shared memory there is."""
    run = functools.partial(sm90_lightning_indexer.logits, sms=132)
    operands = (
        shape(E4M3, t, h, 128), shape(E4M3, s, 128), shape(F32, s), shape(F32, t, h),
        shape(I32, t), shape(I32, t),
    )  # fmt: skip
    jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("b", "t", "h", "most"),
    [
        (128, 2, 64, 1024),
        (1, 1, 32, 3),
        pytest.param(64, 4, 128, 2048, marks=pytest.mark.slow),
        pytest.param(5, 3, 64, 17, marks=pytest.mark.slow),
    ],
)
def test_pages_lower_for_cuda(b, t, h, most):
    run = functools.partial(sm90_lightning_indexer_paged.logits, sms=132)
    operands = (
        shape(E4M3, b, t, h, 128), shape(jnp.uint8, 999, PAGE_BYTES), shape(F32, b, t, h),
        shape(I32, b, most), shape(I32, b),
    )  # fmt: skip
    jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",))


def on_card(function, operands):
    """The kernel's logits, the same both times it is asked."""
    run = jax.jit(functools.partial(function, backend="mosaic_gpu"))
    found, again = np.asarray(run(*operands)), np.asarray(run(*operands))
    np.testing.assert_array_equal(found, again)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("h", [32, 64, 128])
@pytest.mark.parametrize(
    ("t", "s"), [(1, 1), (7, 64), (130, 300), (64, 5000), (333, 1024), (1000, 4096)]
)
def test_card_prompt(t, s, h):
    operands = draw(t, s, h)
    for low, high in (intervals(t, s), causal(t, s), packed(t, max(s, t))):
        expected = np.asarray(index_logits(*operands, low, high, backend="reference"), np.float64)
        found = on_card(index_logits, (*operands, low, high))
        scale = np.asarray(operands[2])  # errors are of the size of a key's own products
        assert_logits(found / scale, expected / scale, rtol=ON_CARD)


@pytest.mark.gpu
def test_card_prompt_among_nan():
    t = s = 700
    q, k, k_scale, weights = draw(t, s, 64)
    low, high = jnp.full(t, 100, jnp.int32), jnp.minimum(causal(t, s)[1], 650)
    expected = np.asarray(index_logits(q, k, k_scale, weights, low, high, backend="reference"))
    seen = (jnp.arange(s) >= 100) & (jnp.arange(s) < 650)
    k = jnp.where(seen[:, None], k.astype(F32), jnp.nan).astype(E4M3)
    operands = q, k, jnp.where(seen, k_scale, jnp.nan), weights, low, high
    assert_logits(on_card(index_logits, operands), expected.astype(np.float64), rtol=ON_CARD)


@pytest.mark.gpu
@pytest.mark.parametrize("h", [32, 64, 128])
@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("b", [1, 5, 200])
def test_card_pages(b, t, h):
    rng = np.random.default_rng([b, t, h])
    lengths = rng.integers(0, 64 * 12 + 1, b)
    lengths[::4] = rng.choice([0, 1, 63, 64, 65, 768], len(lengths[::4]))
    operands, keys = paged(b, t, h, lengths, 12)
    assert_logits(
        on_card(paged_index_logits, operands), true_paged_logits(operands, keys), rtol=ON_CARD
    )


@pytest.mark.gpu
def test_card_cache_is_not_copied():
    """It goes into the kernel as two types of number."""
    operands, _ = paged(2, 1, 64, [1000, 700], 32, poison=False)
    run = jax.jit(functools.partial(paged_index_logits, backend="mosaic_gpu"))
    compiled = run.lower(*operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < operands[1].nbytes // 2


@pytest.mark.gpu
def test_card_long_sequences():
    lengths = [100_000, 0, 3, 40_000]
    operands, keys = paged(4, 2, 64, lengths, 2048, poison=False)
    assert_logits(
        on_card(paged_index_logits, operands), true_paged_logits(operands, keys), rtol=ON_CARD
    )
