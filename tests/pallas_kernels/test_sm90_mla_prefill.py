"""The Hopper kernel of prefill attention and its work table: interpreted, lowered, on a card."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mla_attention_reference
from pallas_kernels import sm90_mla_schedule as schedule
from pallas_kernels.mla_attention import HOPPER_WIDTHS, mla_attention
from pallas_kernels.sm90_mla_prefill import forward


def draw(t, s, b=1, h=2, widths=(64, 64), rope=0, seed=0, size=1.0):
    """q, k, k_rope or None, v: bf16."""
    rng = np.random.default_rng(seed)
    width, values = widths
    shapes = (b, t, h, width), (b, s, h, width - rope), (b, s, rope), (b, s, h, values)
    q, k, k_rope, v = (
        jnp.asarray(np.clip(rng.standard_normal(x) * size, -9, 9), jnp.bfloat16) for x in shapes
    )
    return q, k, k_rope if rope else None, v


def joined(q, k, k_rope, v):
    """With the values behind the keys."""
    return q, jnp.concatenate([k, v], axis=-1), k_rope, None


def packed(lengths, is_causal=True):
    """The intervals of sequences behind one another."""
    ends = np.repeat(np.cumsum(lengths), lengths)
    row = np.arange(sum(lengths))
    low = ends - np.repeat(lengths, lengths)
    return intervals(low, row + 1 if is_causal else ends)


def intervals(low, high):
    low, high = np.broadcast_arrays(np.atleast_2d(low), np.atleast_2d(high))
    return jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)


def causal(t, s):
    return intervals(0, np.maximum(np.arange(t) + s - t + 1, 0))


def scattered(t, s, b, seed=0):
    """Any intervals, every fifth of them empty."""
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.integers(0, s + 1, (2, b, t)), axis=0)
    ends[1] = np.where(np.arange(t) % 5 == 0, ends[0], ends[1])
    return intervals(*ends)


def window(t, s, width):
    """Each query sees the `width` keys up to its own."""
    row = np.arange(t) + s - t + 1
    return intervals(np.maximum(row - width, 0), row)


def interpreted(operands, ends, sms):
    """Fails when the interpreter reports a race."""
    said = io.StringIO()
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    with contextlib.redirect_stdout(said):
        found = forward(
            *operands, *(ends or (None, None)), ends is None, scale=0.2, sms=sms,
            interpret=interpret,
        )  # fmt: skip
        jax.block_until_ready(found)
    assert "RACE" not in said.getvalue(), said.getvalue()
    return found


def assert_agrees(found, expected):
    out, lse = (np.asarray(x, np.float64) for x in found)
    np.testing.assert_allclose(out, np.asarray(expected[0], np.float64), rtol=0.02, atol=0.02)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)


INTERVALS = {
    "packed": (256, 256, 1, packed([100, 28, 1, 127])),
    "packed, not causal": (256, 256, 1, packed([100, 28, 1, 127], is_causal=False)),
    "all see all": (128, 384, 1, intervals(np.zeros(128), 384)),
    "more keys": (128, 500, 1, causal(128, 500)),
    "more queries, some see nothing": (384, 256, 1, causal(384, 256)),
    "nothing to see": (256, 128, 1, intervals(np.full(256, 5), 5)),
    "masked left and right": (128, 640, 1, window(128, 640, 500)),
    "window": (384, 384, 1, window(384, 384, 3)),
    "scattered": (256, 384, 2, scattered(256, 384, 2)),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals(name):
    t, s, b, ends = INTERVALS[name]
    operands = draw(t, -(-s // 128) * 128, b)
    expected = mla_attention_reference.forward(*operands, *ends, scale=0.2)
    assert_agrees(interpreted(operands, ends, sms=3), expected)


@pytest.mark.parametrize(
    ("widths", "rope", "t", "sms"),
    [((192, 128), 0, 256, 2), ((192, 128), 64, 256, 3), ((128, 128), 64, 128, 3),
     ((128, 128), 0, 128, 1), ((64, 64), 0, 384, 2)],
)  # fmt: skip
def test_plain(widths, rope, t, sms):
    operands = draw(t, t, widths=widths, rope=rope)
    expected = mla_attention_reference.forward(*operands, *causal(t, t), scale=0.2)
    assert_agrees(interpreted(operands, None, sms), expected)


@pytest.mark.parametrize(("widths", "rope"), [((192, 128), 64), ((64, 64), 0)])
def test_values_behind_keys(widths, rope):
    operands = draw(128, 128, widths=widths, rope=rope)
    found, apart = (interpreted(x, None, 2) for x in (joined(*operands), operands))
    for one, other in zip(found, apart, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("rope", [0, 64])
def test_widths_of_deepseek_packed(rope):
    ends = packed([200, 56, 1, 127])
    operands = draw(384, 384, widths=(192, 128), rope=rope)
    expected = mla_attention_reference.forward(*operands, *ends, scale=0.2)
    assert_agrees(interpreted(operands, ends, sms=3), expected)


def test_nan_behind_the_end_is_not_read_into_sums():
    """Large scores and rows whose first tiles are all masked: no NaN from -inf minus -inf."""
    operands = draw(128, 384, size=9)
    ends = intervals(np.zeros(128), np.where(np.arange(128) % 2, 384, 3))
    expected = mla_attention_reference.forward(*operands, *ends, scale=0.2)
    assert_agrees(interpreted(operands, ends, sms=1), expected)


def units_of(table):
    table = np.asarray(table)
    return [tuple(table[cta, i]) for cta in range(len(table)) for i in range(table[cta, -1, 0])]


@pytest.mark.parametrize(("heads", "tiles"), [(1, 1), (3, 7), (40, 5), (256, 32), (2, 300)])
def test_tables_hold_every_unit_once(heads, tiles):
    table = schedule.static_table(heads, tiles, 8, lambda tile: tile + 2.5, 132)
    assert sorted(unit for (unit,) in units_of(table)) == list(range(heads * tiles))
    places = schedule.dealt(heads, tiles, 132)
    assert sorted(places[places >= 0]) == list(range(heads * tiles))
    used = places >= 0
    assert (used == np.sort(used, 1)[:, ::-1]).all()  # places that are not used come last
    assert used[:, 0].all()


@pytest.mark.parametrize(("heads", "tiles"), [(256, 32), (128, 64), (128, 96), (1024, 20)])
@pytest.mark.parametrize(
    ("lengths", "most"),
    [(lambda tiles: np.arange(tiles, 0, -1), 1.01), (np.ones, 1.03),
     (lambda tiles: np.ceil(tiles * np.exp(-4 * np.arange(tiles) / tiles)), 1.06)],
)  # fmt: skip
def test_dealing_is_even(heads, tiles, lengths, most):
    places = schedule.dealt(heads, tiles, 132)
    cost = np.where(places < 0, 0, lengths(tiles)[places % tiles] + 1.5).sum(1)
    assert cost.max() / cost.mean() < most


def test_table_of_intervals():
    ends = packed([100, 500, 1, 167])
    table = np.asarray(schedule.device_table(schedule.ranges(*ends), heads=3, sms=4))
    found = {}
    for cta in table:
        lengths = []
        for unit, *words in cta[: cta[-1, 0]]:
            last, count, *_ = (int(half) for word in words for half in schedule.halves(word))
            found[int(unit)] = (last, count)
            lengths.append(count)
    expected = {0: (1, 1), 1: (2, 2), 2: (3, 3), 3: (4, 4), 4: (5, 5), 5: (6, 2)}
    assert found == {head * 6 + tile: seen for head in range(3) for tile, seen in expected.items()}


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("name", INTERVALS)
def test_ranges(name, rows, cols):
    """Against the mask itself: no tile that is seen is left out, none that is cut goes unmasked."""
    t, s, _, (low, high) = INTERVALS[name]
    seen = schedule.ranges(low, high, rows, cols)
    key = np.arange(-(-s // cols) * cols)
    mask = (key >= np.asarray(low)[..., None]) & (key < np.asarray(high)[..., None])
    mask = mask.reshape(low.shape[0], t // rows, rows, -1, cols).transpose(0, 1, 3, 2, 4)
    for row in range(mask.shape[0]):
        for tile in range(mask.shape[1]):
            last, count, clear, mixed = (int(x[row, tile]) for x in seen)
            order = np.arange(last - 1, last - 1 - count, -1)
            assert count >= 1
            assert clear >= 1
            assert order[-1] >= 0
            assert set(np.flatnonzero(mask[row, tile].any((1, 2)))) <= set(order)
            assert mask[row, tile, order[clear:mixed]].all()
            if mask[row, tile].any():
                assert mask[row, tile, order[[0, -1]]].any((1, 2)).all()
            if name in ("packed", "more keys", "all see all", "masked left and right"):
                whole = np.flatnonzero(mask[row, tile].all((1, 2)))
                assert set(whole) - {order[0]} <= set(order[clear:mixed])


@pytest.mark.parametrize("name", ["packed", "packed, not causal", "more keys", "window",
                                  "more queries, some see nothing", "all see all"])  # fmt: skip
def test_transposed(name):
    t, s, _, (low, high) = INTERVALS[name]
    first, end = (np.asarray(x) for x in schedule.transposed(low, high, s + 9))
    key, row = np.arange(s + 9), np.arange(t)
    seen = (key >= np.asarray(low)[0][:, None]) & (key < np.asarray(high)[0][:, None])
    by_key = (row >= first[0][:, None]) & (row < end[0][:, None])
    np.testing.assert_array_equal(by_key, seen.T)


@pytest.mark.parametrize("widths", HOPPER_WIDTHS)
@pytest.mark.parametrize("rope", [0, 64])
@pytest.mark.parametrize("plain", [True, False])
def test_lowers_for_cuda(widths, rope, plain):
    """The interpreter does not look at layouts, nor at how much shared memory there is."""
    if rope >= widths[0]:
        pytest.skip("no columns without position")
    t, s = 256, 256 if plain else 384
    operands = draw(t, s, widths=widths, rope=rope)
    ends = (None, None) if plain else causal(t, s)
    run = functools.partial(forward, plain=plain, scale=0.2, sms=132)
    for given in operands, joined(*operands):
        jax.jit(run).trace(*given, *ends).lower(lowering_platforms=("cuda",))


def assert_close(found, expected, least, relative, cosine):
    """Every element within one of two bounds, and the whole in the same direction."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(found[infinite], expected[infinite])
    x, y = found[~infinite], expected[~infinite]
    off = np.abs(x - y)
    assert ((off <= least) | (off <= relative * np.abs(y))).all(), off.max()
    if y.any():
        assert 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()) < cosine


def on_card(q, k, k_rope, v, **options):
    """The kernel's (out, lse), the same twice, and the float32 reference's."""
    scale = q.shape[-1] ** -0.5
    run = functools.partial(mla_attention, q, k, v, k_rope=k_rope, scale=scale, **options)
    found, again = run(backend="mosaic_gpu"), run(backend="mosaic_gpu")
    q, kv, *_ = joined(q, k, k_rope, v)
    options |= dict(k_rope=k_rope, scale=scale, backend="mosaic_gpu")
    together = mla_attention(q, kv, None, **options)
    for a, b, c in zip(found, again, together, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(c, np.float32))
    expected = run(backend="reference")
    assert_close(found[0], expected[0], 8e-4, 2.01 / 128, 5e-6)
    assert_close(found[1], expected[1], 1e-6, 8.01 / 65536, 5e-6)


DEEPSEEK = [((192, 128), 0), ((192, 128), 64)]
OTHERS = [((128, 128), 0), ((64, 64), 0)]


def tenths(t, s, **options):
    return draw(t, s, size=0.1, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("t", "is_causal", "widths", "rope"),
    [*((t, True, *kind) for kind in DEEPSEEK for t in (1, 100, 128, 500, 1024, 4096)),
     *((t, False, *kind) for kind in DEEPSEEK for t in (100, 1024)),
     *((t, is_causal, *kind) for kind in OTHERS for t in (100, 1024) for is_causal in (0, 1))],
)  # fmt: skip
def test_card(t, is_causal, widths, rope):
    operands = tenths(t, t, b=2, h=16 if t == 4096 else 5, widths=widths, rope=rope)
    on_card(*operands, causal=bool(is_causal))


PACKED = [[1, 99], [128, 128], [500, 12, 1, 511], [4096], [1] * 300, [5, 0, 0, 2000, 91, 0, 2000],
          [100] * 40]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "widths", "rope"),
    [*((lengths, *DEEPSEEK[1]) for lengths in PACKED),
     *((PACKED[2], *kind) for kind in (DEEPSEEK[0], *OTHERS))],
)  # fmt: skip
def test_card_packed(lengths, is_causal, widths, rope):
    t = sum(lengths)
    q, k, k_rope, v = tenths(t, t, h=7, widths=widths, rope=rope)
    bounds = jnp.array([0, *np.cumsum(lengths)], jnp.int32)
    shared = None if k_rope is None else k_rope[0]
    on_card(q[0], k[0], shared, v[0], cu_seqlens=bounds, causal=is_causal)
    ids = np.repeat(np.arange(len(lengths)), lengths)
    both = jnp.asarray(np.stack([ids, np.zeros_like(ids)]), jnp.int32)
    q, k, k_rope, v = tenths(t, t, b=2, h=3, widths=widths, rope=rope)
    on_card(q, k, k_rope, v, segment_ids=both, causal=is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("t", "s", "widths", "rope"),
    [*((t, s, *DEEPSEEK[1])
       for t, s in ((1, 777), (100, 4096), (512, 1300), (1300, 512), (129, 1))),
     *((512, 1300, *kind) for kind in (DEEPSEEK[0], *OTHERS))],
)  # fmt: skip
def test_card_more_or_fewer_keys(t, s, widths, rope):
    on_card(*tenths(t, s, b=2, h=9, widths=widths, rope=rope))


@pytest.mark.gpu
def test_card_any_intervals():
    """The kernel takes what the door never makes: intervals in no order, every fifth empty."""
    operands, ends = tenths(1024, 2048, b=2, h=70), scattered(1024, 2048, 2)
    found = forward(*operands, *ends, False, scale=0.2)
    expected = mla_attention_reference.forward(*operands, *ends, scale=0.2)
    assert_close(found[0], expected[0], 8e-4, 2.01 / 128, 5e-6)
    assert_close(found[1], expected[1], 1e-6, 8.01 / 65536, 5e-6)


CALLS = {
    "plain": lambda ids: {},
    "packed": lambda ids: dict(segment_ids=jnp.stack([ids, 0 * ids])),
    "all see all": lambda ids: dict(causal=False),
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("t", "call", "widths", "rope"),
    [*((t, call, *kind) for t in (100, 512, 1300) for call in CALLS for kind in DEEPSEEK),
     *((1300, call, *kind) for call in ("plain", "packed") for kind in OTHERS)],
)  # fmt: skip
def test_card_gradients(t, call, widths, rope):
    """Of out and lse together, and the same twice."""
    operands = tenths(t, t, b=2, h=3, widths=widths, rope=rope)
    d_out = tenths(t, t, b=2, h=3, widths=(64, widths[1]), seed=1)[3]
    d_lse = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, t)) / 10, jnp.float32)
    options = CALLS[call](jnp.asarray(np.arange(t) * 3 // t, jnp.int32))

    def gradients(backend):
        def attend(q, k, k_rope, v):
            scale = widths[0] ** -0.5
            return mla_attention(q, k, v, k_rope=k_rope, scale=scale, backend=backend, **options)

        return jax.tree.leaves(jax.vjp(attend, *operands)[1]((d_out, d_lse)))

    found, again = gradients("mosaic_gpu"), gradients("mosaic_gpu")
    for a, b, c in zip(found, again, gradients("reference"), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert_close(a, c, 1e-3, 8.01 / 128, 7e-6)
