"""run.py bench gemm: shapes, work, scaling to this card, and a small run of everything."""

import json
import statistics

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import run
from dsjax.bench import Settings, bench_gemm, gemm, products, report
from dsjax.bench.ceilings import XLA_FP8, Ceilings, Device
from dsjax.bench.gemm import OURS, Outcome, Row
from dsjax.bench.peers import Peers, median_factor
from dsjax.bench.records import records
from dsjax.bench.shapes import KINDS, SHAPES, Shape, select, work
from dsjax.bench.timing import Method, Timing
from pallas_kernels.device import is_hopper

TINY, TINY_GROUPED = Shape(16, 128, 256), Shape(16, 128, 256, groups=2)


def timed(seconds: float) -> Timing:
    return Timing(seconds, (seconds,) * 3, "wall")


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("4096x7168x2048", Shape(4096, 7168, 2048)),
        ("g4x256x4096x7168", Shape(256, 4096, 7168, groups=4)),
        ("1x8x16", Shape(1, 8, 16)),
    ],
)
def test_shape_is_parsed_and_printed(text, shape):
    assert Shape.parse(text) == shape
    assert str(shape) == text


@pytest.mark.parametrize(
    "text",
    ["", "16x128", "16x128x256x2", "4x16x128x256", "g2x16x128", "0x8x16", "g0x8x8x16", "-1x8x16",
     "16X128x256", "16x128x256 ", "16,128,256", "1_6x128x256", "g2x16x128x256x1", "٤x128x256"],
)  # fmt: skip
def test_bad_shape_is_named_with_the_right_form(text):
    with pytest.raises(ValueError, match=r"MxNxK.*gGxMxNxK") as refusal:
        Shape.parse(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "kinds", "named"),
    [
        ("g2x16x128x256", ["dense", "wgrad"], "fits none of the kinds dense, wgrad"),
        ("16x128x256", ["masked"], "needs dense, wgrad, bf16"),
        ("16x128x24", ["dense"], "K is 24, dense takes multiples of 16"),
        ("16x100x256", ["bf16"], "N is 100, bf16 takes multiples of 8"),
        ("16x128x256", [], "no kinds"),
    ],
)
def test_shape_that_cannot_run_is_refused(text, kinds, named):
    with pytest.raises(ValueError, match=named):
        select([text], kinds)


def test_shape_runs_in_every_kind_that_takes_it():
    assert select(["g2x16x128x256", "16x128x256", "16x128x256"], KINDS) == [
        ("dense", TINY), ("grouped", TINY_GROUPED), ("masked", TINY_GROUPED), ("wgrad", TINY),
        ("bf16", TINY_GROUPED), ("bf16", TINY),
    ]  # fmt: skip


def test_default_list_has_every_recorded_shape():
    recorded = Peers()
    for kind, count in (("dense", 11), ("grouped", 4), ("masked", 6)):
        known = [text for text in SHAPES[kind] if recorded.deepgemm(kind, Shape.parse(text))]
        assert len(known) == count
    assert len(select([], KINDS)) == sum(map(len, SHAPES.values()))
    for kind, shape in select([], KINDS):
        assert select([str(shape)], [kind]) == [(kind, shape)]


# --- figures -------------------------------------------------------------------------------------


def test_work_by_hand():
    dense = work("dense", Shape(4096, 7168, 2048))
    assert dense.flops == 120_259_084_288
    assert dense.bytes == 8_388_608 + 14_680_064 + 4 * (65_536 + 896) + 58_720_256
    assert work("dense", Shape(1, 8, 144)).bytes == 144 + 8 * 144 + 4 * (2 + 2) + 16
    assert work("bf16", TINY).bytes == 2 * (16 * 256 + 128 * 256 + 16 * 128)
    assert work("wgrad", TINY).bytes == 16 * 256 + 128 * 256 + 4 * (16 * 2 + 128 * 2) + 4 * 16 * 128
    one = work("dense", TINY)
    for kind in ("grouped", "masked"):
        assert work(kind, TINY_GROUPED) == (2 * one.flops, 2 * one.bytes)


def test_bytes_are_those_of_the_arrays():
    for kind, shape in select(["16x128x256", "g2x16x128x256", "24x136x272"], KINDS):
        x = jax.eval_shape(lambda key: products.make(key, kind, shape), jax.random.key(0))  # noqa: B023
        out = jax.eval_shape(lambda x: products.call(kind, x), x)  # noqa: B023
        arrays = [*jax.tree.leaves(x._replace(sizes=None)), out]
        assert work(kind, shape).bytes == sum(a.size * a.dtype.itemsize for a in arrays)


def test_bound_is_the_larger_of_two():
    ceilings = Ceilings(fp8=1e15, bf16=5e14, bandwidth=4e12)
    few, many = work("dense", Shape(64, 2112, 7168)), work("dense", Shape(8192, 8192, 8192))
    assert ceilings.least_seconds("dense", few) == few.bytes / 4e12
    assert ceilings.least_seconds("dense", many) == many.flops / 1e15
    assert ceilings.least_seconds("bf16", many) == many.flops / 5e14


def test_buffer_sets_outgrow_the_cache_and_fit_the_card():
    card = Device(8192, 1 << 30, 200_000_000, 4 << 30, 60, 10**13)
    for kind, shape in select([], KINDS):
        each = work(kind, shape).bytes
        count = card.sets(work(kind, shape))
        assert 2 <= count <= 60
        assert count * each >= 200_000_000
        assert count == 2 or count * each <= 4 << 30


def test_deepgemm_is_scaled_to_this_card():
    peers = Peers({
        ("deepgemm_dense", "64x2112x7168"): 10e-6, ("cublas_fp8_tensor", "64x2112x7168"): 8e-6,
        ("cublas_fp8_tensor", "128x4096x7168"): 10e-6,
        ("deepgemm_grouped_masked", "g4x256x4096x7168"): 60e-6,
    })  # fmt: skip
    masked = Row("masked", Shape(256, 4096, 7168, 4), {OURS: timed(50e-6)})
    rows = [
        Row("dense", Shape(64, 2112, 7168), {OURS: timed(16e-6), XLA_FP8: timed(12e-6)}),
        Row("dense", Shape(128, 4096, 7168), {OURS: timed(20e-6), XLA_FP8: timed(11e-6)}),
        masked,
        Row("wgrad", TINY, {OURS: timed(1e-6)}),
    ]
    outcome = Outcome(Ceilings(1e15, 5e14, 4e12), Method(), rows)
    ratios = [record["times_deepgemm"] for record in records(outcome, peers)]
    assert ratios[0] == pytest.approx(10 * (12 / 8) / 16)
    assert ratios[2] == pytest.approx(60 * statistics.median([12 / 8, 11 / 10]) / 50)
    assert ratios[1] is ratios[3] is None
    outcome.rows = [masked]
    assert records(outcome, peers)[0]["times_deepgemm"] == pytest.approx(60 / 50)
    assert median_factor([None, None]) == 1.0


def test_recorded_peers_are_read():
    peers = Peers()
    shape = Shape(4096, 7168, 2048)
    assert peers.deepgemm("dense", shape) == pytest.approx(104.84e-6)
    assert peers.card_factor(shape, 98.53e-6) == pytest.approx(1.0)
    assert peers.card_factor(TINY, 1e-6) is peers.deepgemm("wgrad", shape) is None


@pytest.mark.parametrize(
    ("kind", "shape"),
    select(["24x136x272"], ["dense", "wgrad"]) + select([str(TINY_GROUPED)], KINDS),
)
def test_error_finds_a_wrong_value(kind, shape, monkeypatch):
    monkeypatch.setattr(products, "CHECKED_ROWS", 16)
    x = products.make(jax.random.key(0), kind, shape)
    out = products.call(kind, x)
    assert products.relative_error(kind, shape, x, out) < 3e-3
    norm = float(jnp.linalg.norm(out.astype(jnp.float32)))
    last = (-1,) * out.ndim
    wrong = out.at[last].set(out[last] + 0.5 * norm)
    assert products.relative_error(kind, shape, x, wrong) == pytest.approx(0.5, rel=0.02)


# --- a run ---------------------------------------------------------------------------------------


def test_command_writes_table_json_and_picture(tmp_path, capfd):
    shapes = ["--shapes", "16x128x256", "g2x16x128x256", "--seconds", "0.002"]
    assert run.main(["bench", "gemm", *shapes, "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "TFLOP/s" in printed
    assert ("jnp reference path" in printed) != is_hopper()
    content = json.loads((tmp_path / "bench_gemm.json").read_text())
    assert {"environment", "method", "ceilings", "rows"} <= content.keys()
    assert content["environment"]["kernels"] == is_hopper()
    found = [(row["kind"], row["shape"]) for row in content["rows"]]
    cases = select(["16x128x256", "g2x16x128x256"], KINDS)
    assert found == [(kind, str(shape)) for kind, shape in cases]
    for row in content["rows"]:
        assert row["us"] > 0
        assert row["relative_error"] < 3e-3
        assert row["tflops"] == pytest.approx(row["flops"] / row["us"] / 1e6)
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["share_of_ceiling"] > 0
        assert (row["xla_fp8_us"] is not None) == (row["kind"] == "dense")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def measured(monkeypatch):
    """Rows come without being timed; the kinds named in `raises` raise instead."""
    raises: dict[str, BaseException] = {}

    def measure(kind, shape, device, method):
        if kind in raises:
            raise raises[kind]
        return Row(kind, shape, {OURS: timed(1e-5)}, 1e-3)

    monkeypatch.setattr(gemm, "measure", measure)
    monkeypatch.setattr(gemm, "measure_ceilings", lambda *_: Ceilings(1e15, 5e14, 4e12))
    return raises


def test_ctrl_c_keeps_what_was_measured(measured, tmp_path, capfd):
    measured["wgrad"] = KeyboardInterrupt()
    arguments = ["--shapes", "16x128x256", "--out", str(tmp_path)]
    assert run.main(["bench", "gemm", *arguments]) == 0
    assert "stopped by Ctrl-C; products timed: 1" in capfd.readouterr().out
    content = json.loads((tmp_path / "bench_gemm.json").read_text())
    assert content["interrupted"]
    assert [row["kind"] for row in content["rows"]] == ["dense"]
    assert (tmp_path / "roofline.png").exists()


def test_product_that_fails_leaves_the_others(measured, tmp_path, capfd):
    measured["wgrad"] = RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
    arguments = ["--shapes", "16x128x256", "--out", str(tmp_path)]
    assert run.main(["bench", "gemm", *arguments]) == run.FAILED
    printed = capfd.readouterr().out
    assert "wgrad 16x128x256: RuntimeError: RESOURCE_EXHAUSTED: out of memory" in printed
    rows = json.loads((tmp_path / "bench_gemm.json").read_text())["rows"]
    assert [(row["kind"], row["failed"]) for row in rows] == [
        ("dense", False), ("wgrad", True), ("bf16", False),
    ]  # fmt: skip


def test_large_product_is_not_checked(monkeypatch):
    monkeypatch.setattr(gemm, "interleaved", lambda programs, method: {OURS: timed(1e-5)})
    device = Device(256, 1024, 0, 1 << 20, 2, checked=10)
    row = gemm.measure("wgrad", TINY, device, Method())
    assert row.error is None
    assert row.note == "too large to check"
    assert not row.failed


def test_live_table_on_a_terminal(measured, tmp_path):
    with open(tmp_path / "screen.txt", "w") as file:
        console = Console(file=file, force_terminal=True, width=200)
        report.run_gemm(Settings(("16x128x256",), ("dense",), tmp_path), console)
    assert "16x128x256" in (tmp_path / "screen.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["gemm", "--shapes", "16x128"], "shape '16x128'"),
        (["gemm", "--shapes", "16x128x256", "--seconds", "0"], "seconds is 0"),
        (["gemm"], "no GPU"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, named, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gemm, "is_gpu", lambda: False)
    out = tmp_path / "out"
    assert run.main(["bench", *arguments, "--out", str(out)]) == run.BAD_INPUT
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert named in line
    assert not out.exists()


def test_bench_is_a_function_too(measured):
    seen = []
    outcome = bench_gemm(Settings(("16x128x256",), ("dense",)), seen.append)
    assert seen == ["ceilings", "dense 16x128x256"]
    assert [row.kind for row in outcome.rows] == ["dense"]
