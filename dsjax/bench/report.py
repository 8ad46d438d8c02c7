"""`run.py bench gemm` for people: progress while it runs, then the table, JSON and picture."""

from __future__ import annotations

from pathlib import Path

import jax
from rich.console import Console

from dsjax.bench import roofline
from dsjax.bench.gemm import Settings, bench_gemm
from dsjax.bench.peers import Peers
from dsjax.bench.records import records, write_json
from dsjax.bench.rows import Outcome
from dsjax.bench.screen import Layout, Record, Screen, beside, micros, print_note, print_table
from pallas_kernels.device import is_hopper

XLA = ("XLA FP8, us", "XLA BF16, us")
HEADS = ("us", "TFLOP/s", "GB/s", "ceiling", "error", *XLA, "x DeepGEMM", "timed by")


def run_gemm(settings: Settings, console: Console) -> tuple[Outcome, list[Path]]:
    """Measure, show and write: the outcome and the files written to `settings.out`.

    The JSON file is written anew after each product, so that it holds what is known whatever ends
    the run. Raises ValueError for settings that do not fit.
    """
    peers, products = Peers(), len(settings.cases())
    settings.out.mkdir(parents=True, exist_ok=True)
    with Screen(console, products, LAYOUT) as screen:

        def measured(outcome: Outcome) -> None:
            write_json(settings.out, outcome, peers)
            screen.measured(records(outcome, peers))

        outcome = bench_gemm(settings, screen.begun, measured)
    print_report(console, outcome, peers)
    device = jax.devices()[0].device_kind
    picture = roofline.draw(settings.out, records(outcome, peers), outcome.ceilings, device)
    written = [write_json(settings.out, outcome, peers), picture]
    return outcome, [path for path in written if path is not None]


def _figures(record: Record) -> list[str]:
    """XLA's times are followed by how many times faster ours is."""
    us, ratio, error = record["us"], record["times_deepgemm"], record["relative_error"]
    return [
        micros(us), f"{record['tflops']:.1f}", f"{record['gbytes_per_s']:.0f}",
        f"{record['share_of_ceiling']:.0%}", "(below)" if error is None else f"{error:.1e}",
        beside(record["xla_fp8_us"], us), beside(record["xla_bf16_us"], us),
        "" if ratio is None else f"{ratio:.2f}", record["timed_by"],
    ]  # fmt: skip


LAYOUT = Layout(HEADS, _figures, whole=XLA, left=("timed by",))


def print_report(console: Console, outcome: Outcome, peers: Peers) -> None:
    """The table, and what its figures are of."""
    found = records(outcome, peers)
    kernels = is_hopper()
    what = "" if kernels else "; NOT a Hopper GPU: the jnp reference path, not the kernels"
    print_table(console, LAYOUT, found, f"GEMM on {jax.devices()[0].device_kind}{what}")
    ceilings = outcome.ceilings
    notes = [
        f"ceilings, this run: FP8 {ceilings.fp8 / 1e12:.4g} TFLOP/s, BF16 "
        f"{ceilings.bf16 / 1e12:.4g}, copy {ceilings.bandwidth / 1e9:.4g} GB/s; (1.10x): ours is "
        "1.10 times as fast",
    ]
    if kernels and any(record.get("times_deepgemm") for record in found):
        notes.append(
            "x DeepGEMM: its recorded time, scaled by XLA FP8 now over cuBLAS then, over ours"
        )
    notes += [f"{r['kind']} {r['shape']}: {r['note']}" for r in found if r["note"]]
    for note in notes:
        print_note(console, note)
