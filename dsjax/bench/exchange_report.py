"""`run.py bench exchange` for people: progress while it runs, then the table, JSON and picture."""

from __future__ import annotations

from pathlib import Path

import jax
from rich.console import Console

from dsjax.bench import exchange_picture
from dsjax.bench.exchange import ExchangeOutcome, ExchangeSettings, bench_exchange
from dsjax.bench.exchange_loops import Cards
from dsjax.bench.exchange_records import ceilings, records, write_json
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

HEADS = ("us", "GB/s", "ceiling", "wrong", "all_to_all, us", "ragged, us")


def run_exchange(
    settings: ExchangeSettings, console: Console
) -> tuple[ExchangeOutcome, list[Path]]:
    """Measure, show and write: the outcome and the files written to `settings.out`.

    The JSON file is written anew after each row, so that it holds what is known whatever ends the
    run. Raises ValueError for settings that do not fit and for less than two devices.
    """
    count = len(settings.cases(Cards.present()))
    settings.out.mkdir(parents=True, exist_ok=True)
    with Screen(console, count, LAYOUT) as screen:

        def measured(outcome: ExchangeOutcome) -> None:
            write_json(settings.out, outcome)
            if outcome.rows[-1].kind != "soak":
                screen.measured(records(outcome))

        outcome = bench_exchange(settings, screen.begun, measured)
    found = records(outcome)
    print_report(console, outcome, found)
    device = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    picture = exchange_picture.draw(settings.out, found, ceilings(outcome), device)
    written = [write_json(settings.out, outcome), picture]
    return outcome, [path for path in written if path is not None]


def _figures(record: Record) -> list[str]:
    """Times of XLA's collectives are followed by how many times faster ours is."""
    us, share, wrong = record["us"], record["share_of_ceiling"], record["wrong_share"]
    return [
        micros(us), f"{record['gbytes_per_s']:.1f}", "" if share is None else f"{share:.0%}",
        "(below)" if wrong is None else f"{wrong:.2g}",
        beside(record["dense_us"], us), beside(record["ragged_us"], us),
    ]  # fmt: skip


LAYOUT = Layout(HEADS, _figures, whole=HEADS)


def print_report(console: Console, outcome: ExchangeOutcome, found: list[Record]) -> None:
    """The table, and what its figures are of."""
    what = "" if is_hopper() else "; NOT Hopper GPUs: the jnp references, not the kernels"
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    table = [record for record in found if record["kind"] != "soak"]
    print_table(console, LAYOUT, table, f"Exchange between {devices}{what}")
    notes = [
        f"ceilings, this run, a device: {_links(outcome)}, of reduce a copy with "
        f"{outcome.ceilings.bandwidth / 1e9:.4g} GB/s; (1.10x): ours is 1.10 times as fast",
        "GB/s: rows that cross to a device, with scales; layout: choices; reduce: its memory",
        "us: sustained, in loops on the devices, the same buffers again and again; wrong: the "
        "share of rows that differ from the reference",
    ]
    for note in [*notes, *row_notes(found)]:
        print_note(console, note)


def _links(outcome: ExchangeOutcome) -> str:
    found = [f"bulk {name} {rate / 1e9:.4g} GB/s" for name, rate in ceilings(outcome).items()]
    return ", ".join(found) or "links not measured"
