"""The Hopper kernels of paged MLA decode: interpreted, lowered for CUDA, and on a card."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device, sm90_mla_combine, sm90_mla_decode
from pallas_kernels.mla_decode import mla_decode, plan_mla_decode
from pallas_kernels.sm90_mla_plan import plan
from tests.pallas_kernels.test_mla_decode import SCALE, case, truth

door = sys.modules[mla_decode.__module__]


def assert_close(found, expected, least, relative, cosine=1.0):
    """Every element within one of two bounds, and the whole in the same direction."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(np.isposinf(found), infinite)
    x, y = found[~infinite], expected[~infinite]
    off = np.abs(x - y)
    assert ((off <= least) | (off <= relative * np.abs(y))).all(), off.max()
    if y.any():
        assert 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()) < cosine


def assert_attends(found, expected, size=0.1):
    """Within FlashMLA's bounds, for keys of that size; no weight anywhere, no output."""
    assert_close(found[0], expected[0], 8e-3 * size, 2.01 / 128, 5e-6)
    assert_close(found[1], expected[1], 1e-6, 8.01 / 65536)
    empty = np.isposinf(np.asarray(found[1]))
    assert not np.asarray(found[0], np.float32)[empty].any()


@pytest.fixture
def interpreted(monkeypatch, capsys):
    """mla_decode by interpreted kernels, with so many SMs; fails on a race."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)
    for module, name in ((sm90_mla_decode, "decode"), (sm90_mla_combine, "combine")):
        kernel = functools.partial(getattr(module, name), interpret=interpret)
        monkeypatch.setattr(module, name, kernel)

    def run(*operands, sms, **options):
        monkeypatch.setattr(door, "_sms", lambda: sms)
        step = functools.partial(mla_decode, scale=SCALE, backend="mosaic_gpu", **options)
        found = jax.block_until_ready(jax.jit(step)(*operands))
        assert "RACE" not in "".join(capsys.readouterr())
        return found

    return run


@pytest.mark.parametrize(
    ("lengths", "heads", "queries", "causal", "sms", "pieces"),
    [
        ([400, 0, 64], 3, 1, True, 4, 1),
        ([520, 1, 0], 40, 3, True, 8, 1),
        ([200, 64], 5, 2, False, 1, 0),
        pytest.param([132], 1, 140, True, 12, 1, marks=pytest.mark.slow),
    ],
)
def test_decode(lengths, heads, queries, causal, sms, pieces, interpreted):
    operands = case(lengths, heads, queries, spare=1)
    parts = max(sms // -(-heads * queries // 64), 1)
    assert int(plan(operands[3], parts).count[0]) == pieces
    found = interpreted(*operands, sms=sms, causal=causal)
    assert_attends(found, truth(*operands, causal))


@pytest.mark.parametrize(
    ("b", "heads", "queries", "pair"),
    [
        (1, 16, 1, False),
        (200, 128, 1, True),
        (9, 63, 4, True),
        pytest.param(64, 126, 3, True, marks=pytest.mark.slow),
        pytest.param(3, 3, 2, False, marks=pytest.mark.slow),
    ],
)
def test_lowers_for_cuda(b, heads, queries, pair, monkeypatch):
    """The interpreter does not look at layouts, nor at how much shared memory there is."""
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)
    assert door._paired(heads * queries) == pair
    of = jax.ShapeDtypeStruct
    q, cache = (of((*shape, 576), jnp.bfloat16) for shape in ((b, queries, heads), (50, 64)))
    step = jax.jit(functools.partial(mla_decode, scale=SCALE, backend="mosaic_gpu"))
    traced = step.trace(q, cache, of((b, 7), jnp.int32), of((b,), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 2


def on_card(*operands, size=0.1, **options):
    """The kernels' (out, lse), the same twice, by a plan that was made before; held to the
    reference."""
    s, h = operands[0].shape[1:3]
    run = functools.partial(mla_decode, scale=SCALE, **options)
    kernel = jax.jit(functools.partial(run, backend="mosaic_gpu"))
    made = jax.jit(functools.partial(plan_mla_decode, queries=s, heads=h))(operands[3])
    found, again = kernel(*operands), kernel(*operands, plan=made)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    expected = jax.jit(functools.partial(run, backend="reference"))(*operands)
    assert_attends(found, expected, size)
    return found


def mixed(b, length, seed):
    """Ragged lengths, up to twice that one; every fifth request is empty."""
    lengths = np.random.default_rng([seed, b, length]).integers(1, 2 * length, b)
    lengths[1::5] = 0
    return lengths.tolist()


HEADS, BATCHES = (1, 3, 9, 63, 64, 126, 128), (1, 2, 6, 64)
QUERIES, MEANS = (1, 2, 4), (20, 140, 4096)
GRID = [
    (BATCHES[i % 4], QUERIES[i % 3], MEANS[(i + i // 3) % 3], HEADS[i % 7], i // 4 % 2, i // 12)
    for i in range(24)
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("b", "queries", "length", "heads", "causal", "ragged"), GRID)
def test_card(b, queries, length, heads, causal, ragged):
    lengths = mixed(b, length, heads) if ragged else [length] * b
    on_card(*case(lengths, heads, queries), causal=bool(causal))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(
    "lengths",
    [
        [0, 0, 0],
        [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 0],
        [40_000],
        [30_000, 5, 0, 700],
        mixed(300, 200, 0),
        [129] * 132,
    ],
    ids=lambda lengths: f"{len(lengths)} up to {max(lengths)}",
)
def test_card_lengths(lengths, heads):
    on_card(*case(lengths, heads, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "queries"), [(1, 200), (5, 150), (2, 129)])
def test_card_more_queries_than_keys(heads, queries):
    """Requests in pieces whose first queries see nothing."""
    found = on_card(*case([130, 150, 0, 199, 1000], heads, queries))
    assert np.isposinf(np.asarray(found[1])).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "queries"), [([4096, 700], 256), ([1000], 512), ([3000, 0, 300], 65)]
)
def test_card_chunks_of_prompts(lengths, queries):
    """Chunked prefill: many queries of a request, the last of its tokens."""
    on_card(*case(lengths, 128, queries))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_card_large_scores(heads):
    """Maxima that rise along the keys, up to hundreds: sums are rescaled often."""
    q, cache, table, lengths = case([3000, 64, 700], heads, 2, size=1)
    row = jnp.arange(cache.shape[0] * 64).reshape(-1, 64, 1)
    rising = (cache * (1 + row % 7)).astype(cache.dtype)
    on_card(q, rising, table, lengths, size=7)


@pytest.mark.gpu
def test_card_a_length_below_zero_that_nobody_checked():
    q, cache, table, lengths = case([300, 70, 20], 64, 1)
    step = jax.jit(functools.partial(mla_decode, scale=SCALE, backend="mosaic_gpu"))
    right = step(q, cache, table, lengths)
    wrong = step(q, cache, table, lengths.at[1].set(-5))
    for one, other in zip(right, wrong, strict=True):
        np.testing.assert_array_equal(np.asarray(one[::2]), np.asarray(other[::2]))
    assert np.isposinf(wrong[1][1]).all()
