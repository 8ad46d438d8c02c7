"""Shapes of attention benchmarks as text, their work, and what is recorded of them."""

from itertools import pairwise

import pytest

from dsjax.bench.ceilings import Device
from dsjax.bench.mla_decode import group_of, sizes_of
from dsjax.bench.mla_records import MlaPeers
from dsjax.bench.mla_shapes import PARTS, SHAPES, Shape, select, work

CARD = Device(8192, 1 << 30, 200_000_000, 4 << 30, 60, 20 * 10**12)
DECODE, PREFILL, SPARSE = Shape(2, 1, 4, 128), Shape(2, 0, 2, 64), Shape(2, 1, 4, k=32)
TINY = (str(DECODE), str(PREFILL), str(SPARSE))


@pytest.mark.parametrize(
    ("text", "shape", "form"),
    [
        ("b128xs2xh64xt4096", Shape(128, 2, 64, 4096), "decode"),
        ("b8xh16xt4096", Shape(8, 0, 16, 4096), "prefill"),
        ("b1xs1xh128xk2048", Shape(1, 1, 128, k=2048), "sparse"),
    ],
)
def test_shape_is_parsed_and_printed(text, shape, form):
    assert Shape.parse(text) == shape
    assert str(shape) == text
    assert shape.form == form


@pytest.mark.parametrize(
    "text",
    ["", "128x1x64x4096", "b2xh4xk32", "b0xh4xt32", "b2xs0xh4xt32", "b2xs1xt32", "b2xs1xh4",
     "b2xs1xh4xt32 ", "B2xs1xh4xt32", "b2xh4xs1xt32", "b2xs1xh4xt32xk32", "b٤xh4xt32"],
)  # fmt: skip
def test_bad_shape_is_named_with_the_right_form(text):
    with pytest.raises(ValueError, match=r"bBxsSxhHxtT.*bBxsSxhHxkK.*bBxhHxtT") as refusal:
        Shape.parse(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "parts", "named"),
    [
        ("b2xh4xt32", ["decode", "sparse"], "fits none of the parts decode, sparse.*needs prefill"),
        ("b2xs1xh4xt32", ["prefill"], "needs decode, ragged, fp8"),
        ("b2xs3xh4xt2", ["decode"], "t is 2, expected at least s = 3"),
        ("b2xs1xh4xt32", [], "no parts"),
    ],
)
def test_shape_that_cannot_run_is_refused(text, parts, named):
    with pytest.raises(ValueError, match=named):
        select([text], parts)


def test_shape_runs_in_every_part_that_takes_it():
    found = select([*TINY, TINY[0]], tuple(PARTS))
    shapes = {"prefill": PREFILL, "sparse": SPARSE}
    assert found == [
        (kind, shapes.get(part, DECODE)) for part, kinds in PARTS.items() for kind in kinds
    ]


def test_default_lists_are_those_recorded():
    peers = MlaPeers()
    assert len(SHAPES["decode"]) == len(set(SHAPES["decode"])) == 96
    assert all(peers.flashmla("decode", shape) for shape in SHAPES["decode"])
    assert all(peers.flashmla("sparse", shape) for shape in SHAPES["sparse"])
    assert len(SHAPES["sparse"]) == 16
    for kind in ("forward", "backward"):
        assert all(peers.cudnn(kind, shape) for shape in SHAPES["prefill"])
    assert len(peers._seconds) == 96 + 16 + 6
    assert peers.flashmla("decode", Shape(128, 1, 128, 4096)) == pytest.approx(222.6e-6)
    assert peers.flashmla("fp8", Shape(128, 1, 128, 4096)) is None
    cases = select([], ["decode", "ragged"])
    groups = [group_of(*case) for case in cases if case[0] == "decode"]
    assert len(sizes_of(cases, CARD)) == 24
    assert sum(old != new for old, new in pairwise(groups)) == 23


def test_work_by_hand():
    dense = work("decode", Shape(128, 2, 64, 4096))
    assert dense.flops == 2 * 128 * 64 * 2 * 4096 * (576 + 512)
    ends = 128 * 2 * 64 * (576 + 512) * 2
    assert dense.bytes == 128 * 4096 * 1152 + ends
    assert work("fp8", Shape(128, 2, 64, 4096)).bytes == 128 * 4096 * 656 + ends
    assert work("ragged", Shape(128, 2, 64, 4096)) == dense
    sparse = work("sparse", Shape(128, 2, 64, k=2048))
    assert sparse == (2 * 128 * 64 * 2 * 2048 * 1088, 128 * 2 * 2048 * 656 + ends)
    forward, backward = (work(kind, Shape(2, 0, 128, 4096)) for kind in ("forward", "backward"))
    assert forward.flops == 2 * 128 * 4096**2 * 320
    assert backward.flops == 2.5 * forward.flops
    assert work("packed_backward", Shape(2, 0, 128, 4096)) == backward


def test_recorded_rates_are_met():
    flops = work("backward", Shape(8, 0, 16, 4096)).flops
    recorded = MlaPeers().cudnn("backward", Shape(8, 0, 16, 4096))
    assert recorded is not None
    assert flops / recorded / 1e12 == pytest.approx(416, rel=1e-3)
