"""The Hopper kernel of attention's gradients and its work: interpreted, lowered, on a card."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mla_attention_reference as reference
from pallas_kernels.mla_attention import HOPPER_WIDTHS
from pallas_kernels.sm90_mla_backward import backward
from pallas_kernels.sm90_mla_backward_work import KEYS, QUERIES, Work
from pallas_kernels.sm90_mla_backward_work import _order as in_order
from tests.pallas_kernels.test_sm90_mla_prefill import (
    causal,
    draw,
    joined,
    packed,
    scattered,
    window,
)

SCALE = 0.2


def problem(t, s, b=1, h=2, widths=(64, 64), rope=0, ends=None):
    """(operands, ends, out, lse, d_out) as the forward pass leaves them."""
    operands = draw(t, s, b, h, widths, rope, size=0.5)
    visible = ends or causal(t, s)
    out, lse = reference.forward(*operands, *visible, scale=SCALE)
    d_out = jax.random.normal(jax.random.key(1), out.shape, jnp.bfloat16)
    return operands, visible, out.astype(jnp.bfloat16), lse, d_out


def gradients(operands, ends, out, lse, d_out, plain, **options):
    bounds = (None, None) if plain else ends
    return backward(*operands, *bounds, plain, out, lse, d_out, scale=SCALE, **options)


def interpreted(*arguments, **options):
    """Fails when the interpreter reports a race. It knows no turns of several SMs: use one."""
    said = io.StringIO()
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    with contextlib.redirect_stdout(said):
        found = gradients(*arguments, interpret=interpret, **options)
        jax.block_until_ready(found)
    assert "RACE" not in said.getvalue(), said.getvalue()
    return found


def expected_of(operands, ends, out, lse, d_out, d_lse=None):
    return reference.backward(*operands, *ends, out, lse, d_out, d_lse, scale=SCALE)


def assert_near(found, expected, most=8e-3):
    for name, a, b in zip(("dq", "dk", "dk_rope", "dv"), found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all(), name
        assert np.linalg.norm(a - b) <= most * np.linalg.norm(b) + 1e-6, name


@pytest.mark.parametrize(
    ("widths", "rope"),
    [((64, 64), 0), ((192, 128), 64),
     pytest.param((192, 128), 0, marks=pytest.mark.slow),
     pytest.param((128, 128), 0, marks=pytest.mark.slow)],
)  # fmt: skip
def test_plain(widths, rope):
    asked = problem(256, 256, widths=widths, rope=rope)
    assert_near(interpreted(*asked, plain=True, sms=1), expected_of(*asked))


@pytest.mark.parametrize(("widths", "rope"), [((64, 64), 0), ((192, 128), 64)])
def test_values_behind_keys(widths, rope):
    """The same bits, dv's behind dk's."""
    operands, *others = problem(128, 128, widths=widths, rope=rope)
    apart = interpreted(operands, *others, plain=True, sms=1)
    found = interpreted(joined(*operands), *others, plain=True, sms=1)
    for one, other in zip(found, joined(*apart), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(
                np.asarray(one, np.float32), np.asarray(other, np.float32)
            )


INTERVALS = {
    "packed": (256, 256, 1, packed([100, 28, 1, 127])),
    "packed, not causal": (256, 256, 1, packed([100, 28, 1, 127], is_causal=False)),
    "more keys": (128, 384, 1, causal(128, 384)),
    "more queries, some see nothing": (384, 256, 1, causal(384, 256)),
    "window": (384, 384, 1, window(384, 384, 3)),
    "scattered": (256, 384, 2, scattered(256, 384, 2)),
}


@pytest.mark.parametrize("name", INTERVALS)
def test_intervals(name):
    t, s, b, ends = INTERVALS[name]
    asked = problem(t, s, b, ends=tuple(jnp.sort(x, axis=1) for x in ends))
    assert_near(interpreted(*asked, plain=False, sms=1), expected_of(*asked))


def test_gradient_of_lse():
    asked = problem(128, 128, h=1)
    d_lse = jax.random.normal(jax.random.key(3), asked[3].shape)
    found = interpreted(*asked, plain=True, sms=1, d_lse=d_lse)
    assert_near(found, expected_of(*asked, d_lse))


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("name", INTERVALS)
def test_both_sides_agree_on_who_meets_whom(name, b):
    """Each tile of queries is added to by the tiles of keys from the last that it meets to the
    first, in turn; one that is waited for and never comes would hang a card."""
    t, s, _, ends = INTERVALS[name]
    s = -(-s // KEYS) * KEYS
    low, high = (jnp.sort(jnp.repeat(x[:1], b, axis=0), axis=1) for x in ends)
    work = Work.of(low, high, b, 3, t, s, False, 5)
    units, last = np.asarray(work.arrays["units"]), np.asarray(work.arrays["last"])
    turns = [[[] for _ in range(t // QUERIES)] for _ in range(b * 3)]
    order = in_order(b * 3, s // KEYS, t)
    for head in range(b * 3):
        tiles = [tile for other, tile in order if other == head]
        assert tiles == list(reversed(range(s // KEYS)))
    seen = set()
    for table in units:
        numbers = table[: table[-1, 0]]
        places = [order.index(divmod(unit, s // KEYS)) for unit in numbers[:, 0].tolist()]
        assert places == sorted(places)  # none stands before one that it waits for
        for unit, ranges, _ in numbers:
            head, tile = divmod(int(unit), s // KEYS)
            seen.add(int(unit))
            for i in range(ranges >> 16, (ranges >> 16) + (ranges & 0xFFFF)):
                turns[head][i].append(int(last[head // 3, i]) - 1 - tile)
    assert seen == set(range(b * 3 * (s // KEYS)))
    for head in turns:
        for found in head:
            assert sorted(found) == list(range(len(found)))
    met = np.asarray([[bool(x) for x in turns[row * 3]] for row in range(b)])
    np.testing.assert_array_equal(np.asarray(work.seen)[:, ::QUERIES], met)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("widths", "rope"), [((192, 128), 64), ((192, 128), 0), ((64, 64), 0)])
def test_lowers_for_cuda(widths, rope, plain):
    operands = draw(256, 256, widths=widths, rope=rope)
    ends = causal(256, 256)
    out = jax.ShapeDtypeStruct((1, 256, 2, widths[1]), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)
    for given in operands, joined(*operands):
        run = functools.partial(gradients, given, ends, plain=plain, sms=132)
        text = jax.jit(run).trace(out, lse, out).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text


def test_a_share_of_the_device_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "40")
    with pytest.raises(ValueError, match="PERCENTAGE is 40: expected 100"):
        gradients(*problem(128, 128), plain=True, sms=1)


@pytest.mark.gpu
@pytest.mark.parametrize("rope", [0, 64])
@pytest.mark.parametrize("widths", HOPPER_WIDTHS)
@pytest.mark.parametrize("t", [128, 512, 2048])
def test_card_plain(t, widths, rope):
    if rope and widths[0] == rope:
        pytest.skip("no keys without position")
    asked = problem(t, t, b=2, h=5, widths=widths, rope=rope)
    run = jax.jit(functools.partial(gradients, plain=True))
    found, again = run(*asked), run(*asked)
    assert_near(found, expected_of(*asked))
    together = run(joined(*asked[0]), *asked[1:])
    for a, b, c in zip(joined(*found), joined(*again), together, strict=True):
        assert a is None or (np.asarray(a, np.float32) == np.asarray(b, np.float32)).all()
        assert a is None or (np.asarray(a, np.float32) == np.asarray(c, np.float32)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("widths", HOPPER_WIDTHS)
@pytest.mark.parametrize("name", INTERVALS)
def test_card_intervals(name, widths):
    t, s, b, ends = INTERVALS[name]
    s = -(-s // KEYS) * KEYS
    ends = tuple(jnp.sort(x, axis=1) for x in ends)
    asked = problem(t, s, b, h=7, widths=widths, ends=ends)
    run = jax.jit(functools.partial(gradients, plain=False))
    found, again = run(*asked), run(*asked)
    assert_near(found, expected_of(*asked))
    for a, b in zip(found, again, strict=True):
        assert a is None or (np.asarray(a, np.float32) == np.asarray(b, np.float32)).all()
