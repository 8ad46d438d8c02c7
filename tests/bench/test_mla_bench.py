"""run.py bench mla: shapes, what is timed and checked, and a small run of everything."""

import importlib
import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import run
from dsjax.bench import MlaSettings, bench_mla, mla, mla_prefill, mla_report
from dsjax.bench.ceilings import Ceilings, Device
from dsjax.bench.check import relative_error
from dsjax.bench.mla_check import checked_row
from dsjax.bench.mla_decode import EQUAL, DecodeRows, Sizes, sizes_of
from dsjax.bench.mla_prefill import CUDNN
from dsjax.bench.mla_records import MlaPeers, records
from dsjax.bench.mla_shapes import PARTS, Shape, select
from dsjax.bench.paged_cache import ragged_lengths
from dsjax.bench.rows import OURS, Outcome, Row
from dsjax.bench.timing import Method, Timing
from pallas_kernels import mla_attention_reference
from pallas_kernels.device import is_hopper

DECODE, PREFILL, SPARSE = Shape(2, 1, 4, 128), Shape(2, 0, 2, 64), Shape(2, 1, 4, k=32)
TINY = (str(DECODE), str(PREFILL), str(SPARSE))
CARD = Device(8192, 1 << 30, 200_000_000, 4 << 30, 60, 20 * 10**12)
SMALL = Device(8, 8, 0, 1 << 20, 2, 10**10)
QUICK = Method(warm=0.0, stretch=1e-4, stretches=1, passes=1, on_card=False)
CEILINGS = Ceilings(1e15, 5e14, 4e12)


def timed(seconds: float) -> Timing:
    return Timing(seconds, (seconds,) * 3, "wall")


# --- figures -------------------------------------------------------------------------------------


def test_records_compare_rows_of_a_run():
    shape = Shape(128, 1, 128, 4096)
    timings = {OURS: timed(2e-4), EQUAL: timed(1e-4), CUDNN: timed(3e-4)}
    rows = [Row(kind, shape, timings, 1e-3) for kind in ("decode", "ragged", "fp8")]
    rows += [Row("forward", PREFILL, timings), Row("packed_forward", PREFILL, timings)]
    found = records(Outcome(CEILINGS, Method(), rows), MlaPeers())
    assert found[0]["times_flashmla"] == pytest.approx(222.6 / 200)
    assert found[0]["share_of_copy"] == pytest.approx(found[0]["gbytes_per_s"] / 4000)
    assert found[0]["share_of_bf16"] == pytest.approx(found[0]["tflops"] / 500)
    assert [row["bf16_cache_us"] for row in found[:3]] == [None, None, pytest.approx(200)]
    assert found[1]["equal_lengths_us"] == pytest.approx(100)
    assert found[1]["times_flashmla"] is found[3]["unpacked_us"] is None
    assert found[3]["cudnn_us"] == pytest.approx(300)
    assert found[4]["unpacked_us"] == pytest.approx(200)


@pytest.mark.parametrize(
    ("found", "named"),
    [(1.5, "wrong"), (float("nan"), "not finite"), (None, "not checked")],
)
def test_wrong_result_fails_its_row_and_keeps_the_time(found, named):
    row = Row("decode", DECODE, {OURS: timed(1e-5)}, note="before")
    wanted = jnp.ones((2, 3), jnp.bfloat16)

    def reference() -> jax.Array:
        if found is None:
            raise RuntimeError("out of memory")
        return wanted

    out = checked_row(row, wanted.at[1, 2].set(found or 0), reference, CARD)
    assert out.failed
    assert out.note.startswith("before; ")
    assert named in out.note
    assert out.seconds() == 1e-5
    assert checked_row(row, wanted, lambda: wanted, CARD).error == 0
    assert relative_error([wanted, 0 * wanted], [wanted, wanted]) == 1


# --- decode and prefill --------------------------------------------------------------------------


def test_rows_that_differ_in_lengths_share_a_program():
    cases = select(["b2xs2xh2xt40", "b2xs2xh2xt200"], ["decode", "ragged"])
    (sizes,) = sizes_of(cases, SMALL).values()
    longest = int(ragged_lengths(2, 200).max())
    assert sizes == Sizes(pool=2 * 8, width=-(-longest // 64), calls=2)
    rows = DecodeRows(cases, SMALL)
    found = [rows.measure(*case, QUICK) for case in cases]
    assert [row.error for row in found] == [0.0] * 4 or is_hopper()
    assert all(EQUAL in row.timings for row in found if row.kind == "ragged")
    (program,) = rows._programs.values()
    assert program._program._cache_size() == 1


def test_wrong_kernel_is_found(monkeypatch):
    module = importlib.import_module("pallas_kernels.mla_decode")
    right = module.mla_decode

    def wrong(*operands, backend, **static):
        out, lse = right(*operands, backend=backend, **static)
        return (out if backend == "reference" else out + 0.1 * abs(out)), lse

    monkeypatch.setattr(module, "mla_decode", wrong)
    shape = Shape(1, 1, 2, 30)
    row = DecodeRows([("decode", shape)], Device(8, 8, 0, 1 << 20, 2, 10**10)).measure(
        "decode", shape, QUICK
    )
    assert row.failed
    assert row.error == pytest.approx(0.1, rel=0.05)


def test_packed_sequences_are_those_of_the_batch():
    shape = Shape(3, 0, 2, 32)
    x = mla_prefill.make(jax.random.key(1), shape)
    for kind in ("packed_forward", "packed_backward"):
        ids = mla_prefill.segment_ids(kind, shape)
        one_row = mla_prefill.call(kind, "auto")(ids, x)
        batch = mla_prefill.call(kind, "reference")(None, x)
        assert relative_error(one_row, batch) < 1e-2
        assert relative_error(jax.tree.map(lambda x: x[::-1], one_row), batch) > 0.5


@pytest.mark.skipif(is_hopper(), reason="watches the reference")
def test_backward_is_timed_without_the_forward(monkeypatch):
    shape = Shape(1, 0, 1, 48)
    sets = [mla_prefill.make(jax.random.key(i), shape) for i in range(2)]
    program = mla_prefill.program("backward", "auto", sets)
    ran = []
    backward = mla_attention_reference.backward
    monkeypatch.setattr(mla_attention_reference, "forward", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(
        mla_attention_reference, "backward", lambda *a, **k: ran.append(1) or backward(*a, **k)
    )
    grads = program.outputs()
    assert ran == [1]  # traced once for both sets
    assert [grad.shape for grad in grads[1]] == [sets[0].q.shape, sets[0].k.shape, sets[0].v.shape]


def test_without_cudnn_the_row_says_why(monkeypatch):
    monkeypatch.setattr(mla_prefill, "program", lambda *_: 1 / 0)
    programs, note = mla_prefill.cudnn_program("forward", [])
    assert not programs
    assert note == "without cuDNN: ZeroDivisionError: division by zero"


# --- a run ---------------------------------------------------------------------------------------


def test_command_writes_table_json_and_pictures(tmp_path, capfd):
    arguments = ["--shapes", *TINY, "--seconds", "0.002", "--out", str(tmp_path)]
    assert run.main(["bench", "mla", *arguments]) == 0
    printed = capfd.readouterr().out
    assert "TFLOP/s" in printed
    assert ("jnp reference path" in printed) != is_hopper()
    content = json.loads((tmp_path / "bench_mla.json").read_text())
    assert {"environment", "method", "ceilings", "rows"} <= content.keys()
    assert "block tables" in content["method"]["description"]
    found = [(row["kind"], row["shape"]) for row in content["rows"]]
    assert found == [(kind, str(shape)) for kind, shape in select(TINY, tuple(PARTS))]
    timed_rows = [row for row in content["rows"] if "us" in row]
    assert len(timed_rows) == len(found) or is_hopper()
    for row in timed_rows:
        assert row["us"] > 0
        assert row["relative_error"] is not None
        assert row["tflops"] == pytest.approx(row["flops"] / row["us"] / 1e6)
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    assert (tmp_path / "ceilings.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "flashmla.png").exists()


@pytest.fixture
def measured(monkeypatch):
    """Rows come without being timed; the kinds named in `raises` raise instead."""
    raises: dict[str, BaseException] = {}

    def measure(kind, shape, *_):
        if kind in raises:
            raise raises[kind]
        return Row(kind, shape, {OURS: timed(1e-5)}, 1e-3)

    monkeypatch.setattr(mla, "measure", measure)
    monkeypatch.setattr(mla, "measure_ceilings", lambda *_: CEILINGS)
    return raises


def test_ctrl_c_keeps_what_was_measured(measured, tmp_path, capfd):
    measured["fp8"] = KeyboardInterrupt()
    shapes = ["b128xs1xh128xt4096", "b128xs1xh128xt8192"]
    assert run.main(["bench", "mla", "--shapes", *shapes, "--out", str(tmp_path)]) == 0
    assert "stopped by Ctrl-C; rows timed: 4" in capfd.readouterr().out
    content = json.loads((tmp_path / "bench_mla.json").read_text())
    assert content["interrupted"]
    assert [row["kind"] for row in content["rows"]] == ["decode", "decode", "ragged", "ragged"]
    for name in ("flashmla.png", "ceilings.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_row_that_fails_leaves_the_others(measured, tmp_path, capfd):
    measured["ragged"] = RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
    arguments = ["--shapes", TINY[0], "--out", str(tmp_path)]
    assert run.main(["bench", "mla", *arguments]) == run.FAILED
    printed = capfd.readouterr().out
    assert f"ragged {TINY[0]}: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in printed
    rows = json.loads((tmp_path / "bench_mla.json").read_text())["rows"]
    assert [(row["kind"], row["failed"]) for row in rows] == [
        ("decode", False), ("ragged", True), ("fp8", False),
    ]  # fmt: skip


def test_live_table_on_a_terminal(measured, tmp_path):
    with open(tmp_path / "screen.txt", "w") as file:
        console = Console(file=file, force_terminal=True, width=200)
        mla_report.run_mla(MlaSettings((TINY[0],), ("decode",), tmp_path), console)
    assert TINY[0] in (tmp_path / "screen.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "b2xs1xh4"], "shape 'b2xs1xh4'"),
        (["--shapes", TINY[0], "--seconds", "0"], "seconds is 0"),
        (["--shapes", TINY[0], "--parts", "sparse"], "fits none of the parts sparse"),
        ([], "no GPU"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, named, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(mla, "is_gpu", lambda: False)
    out = tmp_path / "out"
    assert run.main(["bench", "mla", *arguments, "--out", str(out)]) == run.BAD_INPUT
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert named in line
    assert not out.exists()


def test_bench_is_a_function_too(measured):
    seen = []
    outcome = bench_mla(MlaSettings((TINY[0],), ("decode",)), seen.append)
    assert seen == ["ceilings", f"decode {TINY[0]}"]
    assert [row.kind for row in outcome.rows] == ["decode"]
