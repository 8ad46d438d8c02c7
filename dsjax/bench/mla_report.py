"""`run.py bench mla` for people: progress while it runs, then the table, JSON and pictures."""

from __future__ import annotations

from pathlib import Path

import jax
from rich.console import Console

from dsjax.bench import mla_plots
from dsjax.bench.mla import MlaSettings, bench_mla
from dsjax.bench.mla_records import MlaPeers, records, write_json
from dsjax.bench.rows import Outcome
from dsjax.bench.screen import (
    Layout,
    Record,
    Screen,
    beside,
    micros,
    print_note,
    print_table,
    row_notes,
)
from pallas_kernels.device import is_hopper

SAME_RUN, RECORDED = "in this run, us", "recorded, us"
HEADS = ("us", "TFLOP/s", "GB/s", "of copy", "of BF16", "error", SAME_RUN, RECORDED, "timed by")
PEERS = {
    "cudnn_us": "cuDNN", "equal_lengths_us": "equal lengths", "bf16_cache_us": "BF16 cache",
    "unpacked_us": "a batch",
}  # fmt: skip
RECORDED_PEERS = {"recorded_flashmla_us": "FlashMLA", "recorded_cudnn_us": "cuDNN, torch"}


def run_mla(settings: MlaSettings, console: Console) -> tuple[Outcome, list[Path]]:
    """Measure, show and write: the outcome and the files written to `settings.out`.

    The JSON file is written anew after each row, so that it holds what is known whatever ends the
    run. Raises ValueError for settings that do not fit.
    """
    peers, count = MlaPeers(), len(settings.cases())
    settings.out.mkdir(parents=True, exist_ok=True)
    with Screen(console, count, LAYOUT) as screen:

        def measured(outcome: Outcome) -> None:
            write_json(settings.out, outcome, peers)
            screen.measured(records(outcome, peers))

        outcome = bench_mla(settings, screen.begun, measured)
    found = records(outcome, peers)
    print_report(console, outcome, found)
    pictures = mla_plots.draw(settings.out, found, jax.devices()[0].device_kind)
    return outcome, [write_json(settings.out, outcome, peers), *pictures]


def _figures(record: Record) -> list[str]:
    us, error = record["us"], record["relative_error"]
    return [
        micros(us), f"{record['tflops']:.1f}", f"{record['gbytes_per_s']:.0f}",
        f"{record['share_of_copy']:.0%}", f"{record['share_of_bf16']:.0%}",
        "(below)" if error is None else f"{error:.1e}",
        _first(record, PEERS), _first(record, RECORDED_PEERS), record["timed_by"],
    ]  # fmt: skip


def _first(record: Record, peers: dict[str, str]) -> str:
    """The peer that the row has, if any, with its time and how many times faster ours is."""
    for name, label in peers.items():
        if record[name] is not None:
            return f"{label} {beside(record[name], record['us'])}"
    return ""


LAYOUT = Layout(HEADS, _figures, whole=HEADS, left=("timed by",), width=172)


def print_report(console: Console, outcome: Outcome, found: list[Record]) -> None:
    """The table, and what its figures are of."""
    kernels = is_hopper()
    what = "" if kernels else "; NOT a Hopper GPU: the jnp reference path, not the kernels"
    print_table(console, LAYOUT, found, f"Attention on {jax.devices()[0].device_kind}{what}")
    ceilings = outcome.ceilings
    notes = [
        f"ceilings, this run: BF16 {ceilings.bf16 / 1e12:.4g} TFLOP/s (XLA), copy "
        f"{ceilings.bandwidth / 1e9:.4g} GB/s; (1.10x): ours is 1.10 times as fast",
    ]
    if any(record.get(name) for record in found for name in RECORDED_PEERS):
        notes.append(
            "recorded: on another H200, sustained, from CUDA graphs, so with the gaps between "
            "kernels; ours timed by 'timeline' are without them"
        )
    for note in [*notes, *row_notes(found)]:
        print_note(console, note)
