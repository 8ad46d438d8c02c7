"""`run.py bench training` for people: progress while it runs, then the table, JSON and picture."""

from __future__ import annotations

from pathlib import Path

import jax
from rich.console import Console

from dsjax.bench import training_picture
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
from dsjax.bench.training import TrainingSettings, bench_training
from dsjax.bench.training_records import records, write_json
from pallas_kernels.device import is_hopper

HEADS = ("us", "GB/s", "TFLOP/s", "ceiling", "error", "XLA, us", "XLA's ceiling", "timed by")


def run_training(settings: TrainingSettings, console: Console) -> tuple[Outcome, list[Path]]:
    """Measure, show and write: the outcome and the files written to `settings.out`.

    The JSON file is written anew after each row, so that it holds what is known whatever ends the
    run. Raises ValueError for settings that do not fit.
    """
    count = len(settings.cases())
    settings.out.mkdir(parents=True, exist_ok=True)
    with Screen(console, count, LAYOUT) as screen:

        def measured(outcome: Outcome) -> None:
            write_json(settings.out, outcome)
            screen.measured(records(outcome))

        outcome = bench_training(settings, screen.begun, measured)
    found = records(outcome)
    print_report(console, outcome, found)
    picture = training_picture.draw(settings.out, found, jax.devices()[0].device_kind)
    written = [write_json(settings.out, outcome), picture]
    return outcome, [path for path in written if path is not None]


def _figures(record: Record) -> list[str]:
    """XLA's time is followed by how many times faster ours is."""
    us, error, xla = record["us"], record["relative_error"], record["xla_share_of_ceiling"]
    return [
        micros(us), f"{record['gbytes_per_s']:.0f}",
        f"{record['tflops']:.1f}" if record["flops"] else "",
        f"{record['share_of_ceiling']:.0%}", "(below)" if error is None else f"{error:.1e}",
        beside(record["xla_us"], us), "" if xla is None else f"{xla:.0%}", record["timed_by"],
    ]  # fmt: skip


LAYOUT = Layout(HEADS, _figures, whole=HEADS, left=("timed by",))


def print_report(console: Console, outcome: Outcome, found: list[Record]) -> None:
    """The table, and what its figures are of."""
    what = "" if is_hopper() else "; NOT a Hopper GPU: the jnp reference path, not the kernels"
    device = jax.devices()[0].device_kind
    print_table(console, LAYOUT, found, f"Beside GEMMs and attention, on {device}{what}")
    ceilings = outcome.ceilings
    notes = [
        f"ceilings, this run: copy {ceilings.bandwidth / 1e9:.4g} GB/s, for the head BF16 "
        f"{ceilings.bf16 / 1e12:.4g} TFLOP/s (XLA); (1.10x): ours is 1.10 times as fast",
    ]
    for note in [*notes, *row_notes(found)]:
        print_note(console, note)
