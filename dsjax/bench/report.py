"""`run.py bench gemm` for people: progress while it runs, then the table, JSON and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsjax.bench import roofline
from dsjax.bench.gemm import Outcome, Settings, bench_gemm
from dsjax.bench.peers import Peers
from dsjax.bench.records import records, write_json
from pallas_kernels.device import is_hopper

TABLE_WIDTH = 136
LIVE_ROWS = 12


def run_gemm(settings: Settings, console: Console) -> tuple[Outcome, list[Path]]:
    """Measure, show and write: the outcome and the files written to `settings.out`.

    The JSON file is written anew after each product, so that it holds what is known whatever ends
    the run. Raises ValueError for settings that do not fit.
    """
    peers, products = Peers(), len(settings.cases())
    settings.out.mkdir(parents=True, exist_ok=True)
    with Screen(console, products, peers) as screen:

        def measured(outcome: Outcome) -> None:
            write_json(settings.out, outcome, peers)
            screen.measured(outcome)

        outcome = bench_gemm(settings, screen.begun, measured)
    print_report(console, outcome, peers)
    device = jax.devices()[0].device_kind
    picture = roofline.draw(settings.out, records(outcome, peers), outcome.ceilings, device)
    written = [write_json(settings.out, outcome, peers), picture]
    return outcome, [path for path in written if path is not None]


def table(found: Sequence[dict[str, Any]], title: str | None = None) -> Table:
    """A line a record; XLA's times are followed by how many times faster ours is."""
    grid = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    grid.add_column("kind")
    grid.add_column("shape", no_wrap=True)
    for head in ("us", "TFLOP/s", "GB/s", "ceiling", "error"):
        grid.add_column(head, justify="right")
    for head in ("XLA FP8, us", "XLA BF16, us"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("x DeepGEMM", justify="right")
    grid.add_column("timed by")
    for record in found:
        grid.add_row(*_cells(record))
    return grid


def _cells(record: dict[str, Any]) -> list[str]:
    name, us = [record["kind"], record["shape"]], record.get("us")
    if us is None:
        return [*name, "failed"]
    ratio, error = record["times_deepgemm"], record["relative_error"]
    return [
        *name, _micros(us), f"{record['tflops']:.1f}", f"{record['gbytes_per_s']:.0f}",
        f"{record['share_of_ceiling']:.0%}", "(below)" if error is None else f"{error:.1e}",
        _beside(record["xla_fp8_us"], us), _beside(record["xla_bf16_us"], us),
        "" if ratio is None else f"{ratio:.2f}", record["timed_by"],
    ]  # fmt: skip


def _micros(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.1f}"


def _beside(other: float | None, us: float) -> str:
    return "" if other is None else f"{_micros(other)} ({other / us:.2f}x)"


def print_report(console: Console, outcome: Outcome, peers: Peers) -> None:
    """The table, and what its figures are of."""
    width = max(TABLE_WIDTH, console.width)  # a narrow terminal wraps lines but loses no figure
    wide = Console(file=console.file, width=width, force_terminal=console.is_terminal)
    found = records(outcome, peers)
    kernels = is_hopper()
    what = "" if kernels else "; NOT a Hopper GPU: the jnp reference path, not the kernels"
    wide.print(table(found, f"GEMM on {jax.devices()[0].device_kind}{what}"))
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
        console.print(note, highlight=False, soft_wrap=True, markup=False)


class Screen:
    """Progress: a bar below the newest rows on a terminal, a line a row elsewhere."""

    def __init__(self, console: Console, total: int, peers: Peers):
        self._console, self._peers = console, peers
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._task = self._bar.add_task("compiling", total=total)
        self._live = Live(self._bar, console=console, transient=True)

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def begun(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def measured(self, outcome: Outcome) -> None:
        self._bar.update(self._task, completed=len(outcome.rows))
        found = records(outcome, self._peers)
        if self._console.is_terminal:
            self._live.update(Group(table(found[-LIVE_ROWS:]), self._bar))
            return
        line = " ".join(filter(None, _cells(found[-1])))
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
