"""run.py bench exchange: what is timed, checked and counted, and a small run on CPU devices."""

import functools
import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import run
from dsjax.bench import exchange, exchange_check, exchange_peers
from dsjax.bench.ceilings import Ceilings
from dsjax.bench.exchange import ExchangeOutcome, ExchangeSettings, bench_exchange, measure
from dsjax.bench.exchange_calls import TIMED, prepared
from dsjax.bench.exchange_links import wrong_rows
from dsjax.bench.exchange_loops import AXIS, Cards, Loop, begun
from dsjax.bench.exchange_operands import Operands, crossings, make
from dsjax.bench.exchange_peers import DENSE, RAGGED
from dsjax.bench.exchange_records import records
from dsjax.bench.exchange_report import LAYOUT, run_exchange
from dsjax.bench.exchange_shapes import PARTS, V3, LinkShape, Shape, Sizes, select
from dsjax.bench.exchange_soak import Soak
from dsjax.bench.rows import OURS, Row
from dsjax.bench.timing import Method, Timing
from dsjax.parallel.nvlink import NvLink
from pallas_kernels import device, sm90_expert_combine
from pallas_kernels.quantize import dequantize
from pallas_kernels.sm90_link_ceilings import last_loaded
from tests.train.conftest import quick_compilation

__all__ = ["quick_compilation"]

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu" or jax.device_count() != 8, reason="needs eight CPU devices"
)

OPTIONS = ["--tokens", "6", "--dim", "128", "--experts", "16", "--top-k", "3"]
TINY = Sizes(6, 128, 16, 3)
SHAPE = TINY.shape(8)
QUICK = Method(warm=0.0, stretch=1e-4, stretches=1, passes=1, on_card=False)
CEILINGS = Ceilings(1e15, 5e14, 4e12)
LINK = LinkShape(8, 4096, 7168, 32)


def layouts(ranks, room):
    return NvLink(AXIS, ranks, room=room)


def timed(seconds):
    return Timing(seconds, (seconds,) * 3, "wall")


def settings(parts, tmp_path, **others):
    return ExchangeSettings(layouts, parts, TINY, out=tmp_path, seconds=0.001, **others)


# --- what is timed -------------------------------------------------------------------------------


def test_default_cases():
    found = [f"{kind} {shape}" for kind, shape in select(V3, PARTS, (0, 16), 4)]
    big, low = "r4x4096x7168x8of256", "r4x128x7168x8of256"
    links = [f"r4x4096x{size} B ctas {ctas}" for size in (7168, 14336) for ctas in (32, 128)]
    assert found == [
        *(f"{kind} {shape}" for kind in ("link_loads", "link_stores") for shape in links),
        f"layout {big}",
        *(f"dispatch_{kind} {big}{ctas}" for kind in ("fp8", "fp8_with_layout", "bf16")
          for ctas in ("", " ctas 16")),
        f"reduce {big}", f"combine {big}", f"combine {big} ctas 16",
        f"combine_rows {big}", f"combine_rows {big} ctas 16",
        *(f"{kind}_{how}_product {big}{ctas}" for kind in ("dispatch", "combine")
          for how in ("and", "beside") for ctas in ("", " ctas 16")),
        *(f"low_latency_{kind} {low}{ctas}" for kind in ("dispatch", "combine", "round")
          for ctas in ("", " ctas 16")),
    ]  # fmt: skip
    assert {kind for kind, _ in select(TINY, PARTS, (0,), 8)} - TIMED.keys() == {
        "link_loads", "link_stores",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sizes": Sizes(experts=12, top_k=1)}, "experts is 12: expected a multiple of the 8"),
        ({"ctas": (16, -1)}, "ctas has -1"),
        ({"ctas": ()}, "ctas is empty"),
        ({"parts": ()}, "no parts"),
        ({"parts": ("combine", "gemm")}, "'gemm' is unknown.*links, layout"),
        ({"parts": ("links",)}, "these need Hopper GPUs"),
        ({"rounds": -1}, "rounds is -1"),
    ],
)
def test_settings_that_cannot_run_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        ExchangeSettings(layouts, **{"sizes": TINY, **change}).cases(Cards.present())


def test_one_device_or_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(id=0, device_kind="H200")])
    with pytest.raises(ValueError, match="one device, H200: an exchange needs 2 or more"):
        Cards.present()
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="there are 3 processes"):
        Cards.present()


# --- figures -------------------------------------------------------------------------------------


def test_records_by_hand():
    shape = Shape(8, 4096, 7168, 256, 8)
    timings = {OURS: timed(1e-3), DENSE: timed(2e-3), RAGGED: timed(4e-3)}
    rows = [
        Row("link_loads", LINK, {OURS: timed(1e-3)}, 0.0),
        Row("link_loads", LinkShape(8, 1, 1, 1), {OURS: timed(1e-9)}, 0.5, "wrong", failed=True),
        Row("dispatch_fp8", shape, timings, 0.0),
        Row("combine", shape, {OURS: timed(1e-3)}, 0.0, "without ragged"),
        Row("reduce", shape, {OURS: timed(1e-3)}, 0.0),
        Row("low_latency_dispatch", shape, note="out of memory", failed=True),
        Row("soak", shape, note="3 of 9 rounds", failed=True),
    ]
    crossing = {LINK: 7 * 4096, LinkShape(8, 1, 1, 1): 7, shape: 7000.0}
    outcome = ExchangeOutcome(CEILINGS, Method(), rows, remote_rows=crossing)
    outcome.soak = Soak(9, done=3, dispatched=1)
    link, _, fp8, bf16, reduced, failed, soaked = records(outcome)
    rate = 7 * 4096 * 7168 / 1e-3
    assert link["gbytes_per_s"] == pytest.approx(rate / 1e9)
    assert link["share_of_ceiling"] == 1
    assert fp8["bytes"] == 7000 * (7168 + 4 * 56)
    assert fp8["gbytes_per_s"] == pytest.approx(fp8["bytes"] / 1e-3 / 1e9)
    assert fp8["share_of_ceiling"] == pytest.approx(fp8["bytes"] / 1e-3 / rate)
    assert (fp8["times_dense"], fp8["times_ragged"]) == pytest.approx((2, 4))
    assert (bf16["bytes"], bf16["dense_us"], bf16["times_ragged"]) == (7000 * 14336, None, None)
    memory = (4096 * 8 + 8000) * 14336
    assert reduced["bytes"] == memory
    assert reduced["share_of_ceiling"] == pytest.approx(memory / 1e-3 / 4e12)
    assert LAYOUT.cells(failed)[-1] == "failed"
    assert (soaked["soak"]["done"], soaked["soak"]["dispatched"], soaked["failed"]) == (3, 1, True)


def test_a_call_stays_in_its_loop():
    """One that XLA moved out would cost nothing."""
    cards = Cards.present()
    x = cards.divided(np.ones((8 * 256, 256), np.float32))
    call = cards.program(lambda x: x @ x)
    loop = Loop(cards, lambda x: x @ x, [x], QUICK)
    jax.block_until_ready(call(x))

    def once():
        start = time.perf_counter()
        jax.block_until_ready(call(x))
        return time.perf_counter() - start

    assert max(loop.slope() for _ in range(9)) > min(once() for _ in range(9)) / 10


# --- operands and checks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cards():
    return Cards.present()


@pytest.fixture(scope="module")
def drawn(cards):
    return make(cards, SHAPE, layouts)


def test_rows_that_cross_are_counted_by_token(cards, drawn):
    owner = np.asarray(drawn.chosen).reshape(8, 6, 3) // 2
    wanted = [[sum(other in t for t in own) for other in range(8)] for own in owner]
    assert crossings(cards, drawn).tolist() == wanted


def test_layout_is_that_of_a_count_by_hand():
    shape = Shape(2, 2, 128, 4, 2)
    chosen = np.array([[3, 0], [0, 1], [2, 3], [1, 0]])
    slots, sizes, tokens, count, to = exchange_check.laid_out(chosen, shape)
    assert slots[:4].tolist() == [[-1, 0], [1, 3], [-1, -1], [4, 2]]
    assert slots[4:].tolist() == [[1, -1], [-1, -1], [0, 2], [-1, -1]]
    assert sizes.tolist() == [3, 2, 1, 2]
    assert tokens.tolist() == [0, 1, 3, -1, 0, 2, -1, -1]
    assert count.tolist() == [3, 2]
    assert to.tolist() == [[True, True], [True, False], [False, True], [True, False]]


def test_sums_may_differ_by_rounding_only():
    x = jnp.array([[1.0, -4.0], [1.0, -4.0], [1.0, -4.0]])
    other = x.at[0, 0].add(4 * 2.0**-7).at[1, 0].add(4 * 2.0**-6).at[2, 0].set(jnp.nan)
    assert exchange_check.off_by_more(other, x).tolist() == [False, True, True]


def test_low_latency_dispatch_brings_tokens(cards, drawn):
    """Those of all devices, in the rows that slots name, and nothing home from an empty combine."""
    call, operands, state = prepared("low_latency_dispatch", SHAPE, layouts, drawn, "reference")
    once = cards.program(lambda *operands: begun(call, state, operands)(*operands))
    q, scale, counts, slots, _, home = (np.asarray(x) for x in once(*operands))
    rows = np.asarray(dequantize(q, scale, jnp.float32, block_rows=1)).reshape(8, -1, 128)
    device, token, j = np.nonzero(slots.reshape(8, 48, 3) >= 0)
    found = rows[device, slots.reshape(8, 48, 3)[device, token, j]]
    assert np.abs(found - np.asarray(drawn.x, np.float32)[token]).max() < 0.2  # e4m3's rounding
    assert counts.sum() == len(found) == 8 * 6 * 3
    assert not home.any()


WRONG = {
    "layout": lambda slots, *others: (slots.at[0, 0].add(1), *others),
    "dispatch_fp8": lambda q, scale: (q, scale.at[:, 0].mul(2)),
    "combine": lambda sums: (sums.at[3].set(sums[2]),),
    "dispatch_beside_product": lambda q, scale, out: (q, scale, out.at[2].set(out[1])),
    "combine_beside_product": lambda sums, out: (sums.at[3].set(sums[2]), out),
    "low_latency_dispatch": lambda *found: (found[0], found[1].at[:, 0].mul(2), *found[2:]),
    "low_latency_combine": lambda home, counts: (home.at[2].set(home[1]), counts),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_row_is_found(kind, cards, monkeypatch):
    right = TIMED[kind]

    def other(first, *operands):
        first, backend = first if right.state else (first, first.backend)
        found = right.call(first, *operands)
        return found if backend == "reference" else WRONG[kind](*found)

    def state(shape, backend, *operands):
        return right.state(shape, backend, *operands), backend

    changed = right._replace(call=other, state=state if right.state else None)
    monkeypatch.setitem(TIMED, kind, changed)
    row = measure(kind, SHAPE, cards, layouts, QUICK, {})
    assert row.failed
    assert row.error > 0
    assert row.note.endswith("rows are wrong")
    assert OURS in row.timings


def test_low_latency_round_is_right(cards):
    """Again and again on one inbox, opened before."""
    row = measure("low_latency_round", SHAPE, cards, layouts, QUICK, {})
    assert (row.failed, row.error) == (False, 0)


def test_links_rows_are_counted(cards):
    """As the kernels would leave them, and one row otherwise."""
    x = np.random.default_rng(0).standard_normal((8, 5, 16)).astype(np.float32)
    shape, stages = LinkShape(8, 5, 64, 2), 3
    loaded = np.zeros((8, 2, stages, 16), np.float32)
    for me in range(8):
        rank, row, there = map(np.asarray, last_loaded(5, 2, stages, 8, me))
        loaded[me] = np.where(there[:, :, None], x[rank % 8, np.where(there, row, 0)], 9)
    stored = np.tile(x[None, :, np.arange(5) % 2], (8, 1, 1, 1))
    for kind, given, found in (("link_loads", x, loaded), ("link_stores", x[:, :2], stored)):
        count = cards.program(functools.partial(wrong_rows, kind, shape))
        flat = [cards.divided(part.reshape(-1, 16)) for part in (given, found)]
        if kind == "link_loads":
            flat[1] = flat[1].reshape(16, stages, 16)
        wrong, rows = np.asarray(count(*flat)).sum(0)
        assert (wrong, rows) == (0, 8 * (2 * stages if kind == "link_loads" else 7 * 5))
        other = jnp.roll(flat[1], 1, axis=-1)
        assert np.asarray(count(flat[0], other)).sum(0)[0] == rows


# --- kernels, as far as they go without a card ---------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """As if there were such cards."""
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)
    size = SimpleNamespace(get_default_device=lambda: SimpleNamespace(core_count=132))
    monkeypatch.setattr(sm90_expert_combine, "backend", size)


def lowered(cards, call, operands, *_):
    return cards.program(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "kind",
    ["dispatch_fp8_with_layout", "dispatch_bf16", "combine", "low_latency_round",
     "dispatch_beside_product", "combine_beside_product"],
)  # fmt: skip
def test_timed_kernels_lower_for_cuda(kind, cards, hopper):
    shape = Shape(8, 256, 7168, 256, 8, ctas=16)
    rows, tokens = 8 * 256, 8 * 2048
    of, d, k = jax.ShapeDtypeStruct, shape.dim, shape.top_k
    f8, i32, f32, bf16 = jnp.float8_e4m3fn, jnp.int32, jnp.float32, jnp.bfloat16
    x = Operands(
        of((rows, d), bf16), of((rows, d), f8), of((rows, 56), f32), of((rows, k), i32),
        of((tokens, k), f32), of((rows, k), f32), of((tokens, k), i32), of((tokens,), i32),
        of((8,), i32), of((rows, 8), bool), of((256,), i32), of((8,), bool),
        of((8 * 2048, d), bf16), of((tokens, d), bf16), of((8 * d, d), f8), of((8 * 56, 56), f32),
    )  # fmt: skip
    call, operands, state = prepared(kind, shape, layouts, x, "mosaic_gpu")
    text = lowered(cards, lambda *given: begun(call, state, given)(*given), operands)
    assert text.count("mosaic_gpu") >= 1


def test_collectives_lower_for_cuda(cards, monkeypatch):
    monkeypatch.setattr(exchange_peers, "Loop", lowered)
    monkeypatch.setattr(exchange_peers, "is_gpu", lambda: True)
    crossing = np.full((8, 8), 3)
    both, note = exchange_peers.loops(cards, SHAPE, crossing, ("fp8", "bf16"), QUICK)
    assert not note
    assert both[DENSE].count("stablehlo.all_to_all") == 2
    assert both[RAGGED].count("@ragged_all_to_all") == 2


# --- a run ---------------------------------------------------------------------------------------


def test_command_writes_table_json_and_picture(tmp_path, capfd):
    parts = ["links", "layout", "dispatch", "combine"]
    arguments = [*OPTIONS, "--parts", *parts, "--seconds", "0.001", "--rounds", "4"]
    assert run.main(["bench", "exchange", *arguments, "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "jnp references" in printed
    assert "links not measured" in printed
    assert "4 of 4 rounds, 0 wrong rows dispatched, 0 combined" in printed
    content = json.loads((tmp_path / "bench_exchange.json").read_text())
    assert "slope" in content["method"]["description"]
    *rows, soaked = content["rows"]
    wanted = [case for case in select(TINY, parts, (0,), 8) if case[0] in TIMED]
    assert [(row["kind"], row["shape"]) for row in rows] == [(k, str(s)) for k, s in wanted]
    assert soaked["soak"]["done"] == 4
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for row in rows:
        assert lines.count(" ".join(filter(None, LAYOUT.cells(row)))) == 2  # progress and table
        assert row["us"] > 0
        assert row["wrong_share"] == 0
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        has_peer = row["kind"] not in ("layout", "reduce")
        assert (row["dense_us"] is not None) == has_peer
        assert ("without ragged" in row["note"]) == has_peer
    assert (tmp_path / "exchange.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def measured(monkeypatch):
    """Rows come without being timed; the kinds named in `raises` raise instead."""
    raises: dict[str, BaseException] = {}

    def measure(kind, shape, cards, layouts, method, remote_rows):
        if kind in raises:
            raise raises[kind]
        remote_rows[shape] = 40.0
        return Row(kind, shape, {OURS: timed(1e-5), DENSE: timed(2e-5)}, 0.0)

    monkeypatch.setattr(exchange, "measure", measure)
    monkeypatch.setattr(exchange, "measure_ceilings", lambda *_: CEILINGS)
    return raises


def test_wrong_rows_fail_the_run(measured, monkeypatch, tmp_path, capfd):
    failed = Soak(4, 4, dispatched=2)
    monkeypatch.setattr(exchange, "soak", lambda *_: failed)
    arguments = [*OPTIONS, "--parts", "combine", "--rounds", "4", "--out", str(tmp_path)]
    assert run.main(["bench", "exchange", *arguments]) == run.FAILED
    assert "soak r8x6x128x3of16: 4 of 4 rounds, 2 wrong rows" in capfd.readouterr().out


def test_ctrl_c_keeps_what_was_measured(measured, tmp_path, capfd):
    measured["dispatch_bf16"] = KeyboardInterrupt()
    arguments = [*OPTIONS, "--parts", "dispatch", "combine", "--rounds", "3"]
    assert run.main(["bench", "exchange", *arguments, "--out", str(tmp_path)]) == 0
    assert "stopped by Ctrl-C; rows timed: 2" in capfd.readouterr().out
    content = json.loads((tmp_path / "bench_exchange.json").read_text())
    assert content["interrupted"]
    kinds = [row["kind"] for row in content["rows"]]
    assert kinds == ["dispatch_fp8", "dispatch_fp8_with_layout"]
    assert (tmp_path / "exchange.png").exists()


def test_row_that_fails_leaves_the_others(measured, tmp_path, capfd):
    measured["reduce"] = RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
    arguments = [*OPTIONS, "--parts", "combine", "--out", str(tmp_path)]
    assert run.main(["bench", "exchange", *arguments]) == run.FAILED
    assert "RuntimeError: RESOURCE_EXHAUSTED: out of memory" in capfd.readouterr().out
    rows = json.loads((tmp_path / "bench_exchange.json").read_text())["rows"]
    assert [row["failed"] for row in rows] == [True, False, False]


def test_soak_that_cannot_run_is_a_failed_row(measured, monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(exchange, "soak", broken)
    outcome = bench_exchange(settings(("combine",), tmp_path, rounds=2))
    assert [row.failed for row in outcome.rows] == [False, False, False, True]


def test_live_table_on_a_terminal(measured, tmp_path):
    with open(tmp_path / "screen.txt", "w") as file:
        console = Console(file=file, force_terminal=True, width=200)
        run_exchange(settings(("combine",), tmp_path, ctas=(0, 16)), console)
    assert "r8x6x128x3of16 ctas 16" in (tmp_path / "screen.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*OPTIONS, "--top-k", "17"], "top_k is 17"),
        ([*OPTIONS, "--dim", "0"], "dim is 0: expected 1 or more"),
        ([*OPTIONS, "--seconds", "0"], "seconds is 0"),
        ([], "no GPU"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, named, tmp_path, capfd):
    out = tmp_path / "out"
    assert run.main(["bench", "exchange", *arguments, "--out", str(out)]) == run.BAD_INPUT
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert named in line
    assert not out.exists()
