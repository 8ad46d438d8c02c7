"""run.py bench training: what is timed and checked, and a small run of everything."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import run
from dsjax.bench import Sizes, TrainingSettings, bench_training, training, training_calls
from dsjax.bench.ceilings import Ceilings, Device
from dsjax.bench.check import relative_error
from dsjax.bench.quantized import Quantized
from dsjax.bench.rows import OURS, Outcome, Row
from dsjax.bench.timing import Method, Timing
from dsjax.bench.training import XLA, measure
from dsjax.bench.training_calls import TIMED, make, work
from dsjax.bench.training_picture import draw
from dsjax.bench.training_records import records
from dsjax.bench.training_report import LAYOUT, run_training
from dsjax.bench.training_shapes import PARTS, Shape, select
from pallas_kernels.device import is_hopper
from pallas_kernels.quantize import quantize_tiles
from tests.train.conftest import quick_compilation

__all__ = ["quick_compilation"]

OPTIONS = [
    "--tokens", "16", "--batch", "2", "--dim", "128", "--experts", "4", "--top-k", "2",
    "--expert-hidden", "128", "--shared-hidden", "128", "--vocab-size", "256",
]  # fmt: skip
TINY = Sizes(16, 2, 128, 4, 2, 128, 128, 256)
SMALL = Device(8, 8, 0, 1 << 20, 2, 10**10)
QUICK = Method(warm=0.0, stretch=1e-4, stretches=1, passes=1, on_card=False)
CEILINGS = Ceilings(1e15, 5e14, 4e12)
SPREAD = Shape((6, 2, 16), groups=3)


def timed(seconds: float) -> Timing:
    return Timing(seconds, (seconds,) * 3, "wall")


# --- figures -------------------------------------------------------------------------------------


def test_records_by_hand():
    copied, head = Shape((256, 128)), Shape((8, 4096, 2048, 102400))
    timings = {OURS: timed(2e-3), XLA: timed(3e-3)}
    rows = [
        Row("quantize_tiles", copied, timings, 1e-3),
        Row("linear_cross_entropy", head, {OURS: timed(4e-2)}, 1e-3, "without XLA"),
        Row("combine_rows", SPREAD, note="out of memory", failed=True),
    ]
    first, second, third = records(Outcome(CEILINGS, Method(), rows))
    least = (3 * 256 * 128 + 4 * 256) / 4e12
    assert first["share_of_ceiling"] == pytest.approx(least / 2e-3)
    assert first["xla_share_of_ceiling"] == pytest.approx(least / 3e-3)
    assert (first["xla_us"], first["times_xla"]) == pytest.approx((3000, 1.5))
    assert second["share_of_ceiling"] == pytest.approx(2 * 32768 * 2048 * 102400 / 5e14 / 4e-2)
    assert second["xla_us"] is second["times_xla"] is second["xla_share_of_ceiling"] is None
    assert "us" not in third
    assert LAYOUT.cells(third)[-1] == "failed"


# --- operands and checks -------------------------------------------------------------------------


def test_rows_lie_in_groups_of_different_lengths():
    x, sizes = make(jax.random.key(0), "quantize_both", Shape((300, 16), groups=5))
    assert x.shape == (300, 16)
    assert sizes.sum() == 300
    assert len(set(sizes.tolist())) > 1


def test_tokens_go_to_experts_of_their_own():
    _, slots, weights = make(jax.random.key(0), "combine_rows", Shape((50, 3, 16), groups=5))
    assert sorted(slots.ravel().tolist()) == list(range(150))
    assert weights.shape == slots.shape
    assert all(len(set(row)) == 3 for row in slots.tolist())


def test_quantised_values_are_compared_times_their_scales():
    q, scale = quantize_tiles(jax.random.normal(jax.random.key(0), (16, 256)))
    x = Quantized(q, scale.T)
    other = Quantized((q.astype(jnp.float32) / 2).astype(q.dtype), 2 * scale.T)
    assert relative_error([x], [other]) < 1e-2  # some of the least numbers are rounded
    wrong = x._replace(scale_t=x.scale_t.at[1].mul(1.5))
    assert relative_error([wrong], [x]) == pytest.approx(0.5 * 2**-0.5, rel=0.1)
    assert np.isnan(relative_error([x._replace(scale_t=x.scale_t * jnp.nan)], [x]))


def test_casts_give_the_values_back():
    shape = Shape((40, 64), groups=2)
    x, sizes = make(jax.random.key(0), "quantize_both", shape)
    rows, columns = training_calls.call("quantize_both", "reference", (x, sizes))
    first = int(sizes[0])
    for found, wanted in ((rows.numbers(), x), (columns.numbers()[:, :first], x[:first].T)):
        assert relative_error(found, wanted) == pytest.approx(0.025, abs=0.005)  # e4m3's rounding
    (again,) = training_calls.call("requantize_transposed", "reference", (rows, sizes))
    assert relative_error(again.numbers()[:, :first], x[:first].T) < 0.05


def test_head_is_checked_in_float32():
    row = measure("linear_cross_entropy_grad", Shape((2, 8, 64, 256)), SMALL, QUICK)
    assert not row.failed
    assert 1e-4 < row.error < 1e-2  # gradients rounded to bfloat16


def replaced(monkeypatch, call):
    """Lets spread_rows be call(right, x, slots, backend), and returns how its row comes out."""
    work("spread_rows", SPREAD)
    right = TIMED["spread_rows"]

    def other(x, slots, *, backend):
        return call(right.call, x, slots, backend)

    monkeypatch.setitem(TIMED, "spread_rows", right._replace(call=other))
    return measure("spread_rows", SPREAD, SMALL, QUICK)


def test_wrong_kernel_is_found(monkeypatch):
    def wrong(right, x, slots, backend):
        out = right(x, slots, backend=backend)
        return out if backend == "reference" else out[::-1]

    row = replaced(monkeypatch, wrong)
    assert row.failed
    assert row.note == "the result is wrong"
    assert row.timings.keys() == {OURS, XLA}


@pytest.mark.parametrize(("failures", "failed"), [(1, False), (2, True)])
def test_where_xla_fails_ours_is_timed(failures, failed, monkeypatch):
    left = [RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")] * failures

    def failing(right, x, slots, backend):
        if backend == "reference" and left:
            raise left.pop()
        return right(x, slots, backend=backend)

    row = replaced(monkeypatch, failing)
    without, *unchecked = row.note.split("; ")
    assert row.timings.keys() == {OURS}
    assert without == "without XLA: RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert row.failed == failed == bool(unchecked)
    assert row.error == (None if failed else 0.0)


@pytest.mark.parametrize(("hopper", "backend"), [(True, "mosaic_gpu"), (False, "auto")])
def test_hopper_takes_kernels_or_says_why_not(hopper, backend, monkeypatch):
    monkeypatch.setattr(training_calls, "is_hopper", lambda: hopper)
    assert training_calls.kernels() == backend


# --- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [("permute", "head"), pytest.param(PARTS, marks=pytest.mark.slow)], ids="-".join
)
def test_command_writes_table_json_and_picture(parts, tmp_path, capfd):
    arguments = [*OPTIONS, "--parts", *parts, "--seconds", "0.002", "--out", str(tmp_path)]
    assert run.main(["bench", "training", *arguments]) == 0
    printed = capfd.readouterr().out
    assert ("jnp reference path" in printed) != is_hopper()
    content = json.loads((tmp_path / "bench_training.json").read_text())
    assert {"environment", "method", "ceilings", "rows"} <= content.keys()
    assert content["environment"]["kernels"] == is_hopper()
    assert "experts at" in content["method"]["description"]
    found = [(row["kind"], row["shape"]) for row in content["rows"]]
    assert found == [(kind, str(shape)) for kind, shape in select(TINY, parts)]
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for row in content["rows"]:
        assert lines.count(" ".join(filter(None, LAYOUT.cells(row)))) == 2  # progress and table
        assert row["us"] > 0
        assert row["relative_error"] < 5e-3
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["times_xla"] == pytest.approx(row["xla_us"] / row["us"])
        assert row["share_of_ceiling"] > 0
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def measured(monkeypatch):
    """Rows come without being timed; the kinds named in `raises` raise instead."""
    raises: dict[str, BaseException] = {}

    def measure(kind, shape, *_):
        if kind in raises:
            raise raises[kind]
        return Row(kind, shape, {OURS: timed(1e-5)}, 1e-3, "without XLA: out of memory")

    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(training, "measure_ceilings", lambda *_: CEILINGS)
    return raises


def test_ctrl_c_keeps_what_was_measured(measured, tmp_path, capfd):
    measured["combine_rows"] = KeyboardInterrupt()
    arguments = [*OPTIONS, "--parts", "permute", "head", "--out", str(tmp_path)]
    assert run.main(["bench", "training", *arguments]) == 0
    printed = capfd.readouterr().out
    assert "stopped by Ctrl-C; rows timed: 2" in printed
    both = "spread_rows g4x16x2x128, spread_quantized g4x16x2x128"
    assert f"{both}: without XLA: out of memory" in printed
    content = json.loads((tmp_path / "bench_training.json").read_text())
    assert content["interrupted"]
    assert [row["kind"] for row in content["rows"]] == ["spread_rows", "spread_quantized"]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_row_that_fails_leaves_the_others(measured, tmp_path, capfd):
    measured["spread_quantized"] = RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
    arguments = [*OPTIONS, "--parts", "permute", "--out", str(tmp_path)]
    assert run.main(["bench", "training", *arguments]) == run.FAILED
    named = "spread_quantized g4x16x2x128: RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert named in capfd.readouterr().out
    rows = json.loads((tmp_path / "bench_training.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == [False, True, False]


def test_nothing_timed_is_not_drawn(tmp_path):
    row = Row("combine_rows", SPREAD, note="out of memory", failed=True)
    assert draw(tmp_path, records(Outcome(CEILINGS, Method(), [row])), "cpu") is None


def test_live_table_on_a_terminal(measured, tmp_path):
    with open(tmp_path / "screen.txt", "w") as file:
        console = Console(file=file, force_terminal=True, width=200)
        run_training(TrainingSettings(("permute",), TINY, tmp_path), console)
    assert "g4x16x2x128" in (tmp_path / "screen.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "12"], "tokens is 12"),
        ([*OPTIONS, "--top-k", "5"], "top_k is 5"),
        ([*OPTIONS, "--seconds", "0"], "seconds is 0"),
        ([], "no GPU"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, named, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(training, "is_gpu", lambda: False)
    out = tmp_path / "out"
    assert run.main(["bench", "training", *arguments, "--out", str(out)]) == run.BAD_INPUT
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert named in line
    assert not out.exists()


def test_part_that_does_not_exist_ends_with_the_parts(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        run.main(["bench", "training", *OPTIONS, "--parts", "gemm", "--out", str(tmp_path)])
    assert stop.value.code == run.BAD_INPUT
    assert "permute" in capfd.readouterr().err


def test_bench_is_a_function_too(measured):
    seen = []
    outcome = bench_training(TrainingSettings(("head",), TINY), seen.append)
    shape = "2x8x128x256"
    assert seen == [
        "ceilings", f"linear_cross_entropy {shape}", f"linear_cross_entropy_grad {shape}",
    ]  # fmt: skip
    assert len(outcome.rows) == 2
