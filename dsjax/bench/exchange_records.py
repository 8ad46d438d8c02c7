"""What `run.py bench exchange` found as flat records, and the JSON file that holds them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsjax.bench import exchange_calls, exchange_loops, exchange_operands, exchange_peers
from dsjax.bench.exchange import ExchangeOutcome, ExchangeRow
from dsjax.bench.exchange_calls import TIMED
from dsjax.bench.exchange_operands import work
from dsjax.bench.exchange_peers import DENSE, RAGGED
from dsjax.bench.exchange_shapes import LinkShape
from dsjax.bench.records import figures, micro, write
from dsjax.bench.rows import OURS

JSON = "bench_exchange.json"


def records(outcome: ExchangeOutcome) -> list[dict[str, Any]]:
    """One flat dict a row: seconds as microseconds, ratios, and what they were made from.

    gbytes_per_s is of a device: what crosses to it, of `reduce` what its memory moves. A ratio
    above 1 says that ours is faster; a share is of the best link row of the same direction, and of
    `reduce` of a copy on one device.
    """
    links = ceilings(outcome)
    return [_record(row, outcome, links) for row in outcome.rows]


def ceilings(outcome: ExchangeOutcome) -> dict[str, float]:
    """Bytes/s a device of the best link row of either direction that is not wrong."""
    found: dict[str, float] = {}
    for row in outcome.rows:
        if isinstance(row.shape, LinkShape) and row.timings and not row.failed:
            direction = row.kind.removeprefix("link_")
            moved = work(row.kind, row.shape, outcome.remote_rows[row.shape]).bytes
            rate = moved / row.timings[OURS].seconds
            found[direction] = max(rate, found.get(direction, 0.0))
    return found


def _record(row: ExchangeRow, outcome: ExchangeOutcome, links: dict[str, float]) -> dict[str, Any]:
    if row.kind == "soak":
        counted = dataclasses.asdict(outcome.soak) if outcome.soak else {}
        name = {"kind": row.kind, "shape": str(row.shape)}
        return {**name, "note": row.note, "failed": row.failed, "soak": counted}
    remote, seconds = outcome.remote_rows.get(row.shape), row.seconds()
    each = work(row.kind, row.shape, remote or 1.0)
    found = figures(row, each)
    found["wrong_share"] = found.pop("relative_error")  # rows are right or wrong here
    for name in ("flops", "intensity", "tflops"):
        found.pop(name, None)
    if seconds is None or remote is None:
        return found | {"bytes": None}
    dense, ragged = row.seconds(DENSE), row.seconds(RAGGED)
    best = _ceiling(row, outcome, links)
    return found | {
        "timed_by": "loops", "remote_rows": remote, "dense_us": micro(dense),
        "ragged_us": micro(ragged), "times_dense": dense / seconds if dense else None,
        "times_ragged": ragged / seconds if ragged else None,
        "share_of_ceiling": each.bytes / seconds / best if best else None,
    }  # fmt: skip


def _ceiling(row: ExchangeRow, outcome: ExchangeOutcome, links: dict[str, float]) -> float | None:
    if isinstance(row.shape, LinkShape):
        return links.get(row.kind.removeprefix("link_"))
    if row.kind == "reduce":
        return outcome.ceilings.bandwidth
    return links.get(TIMED[row.kind].link or "")


def write_json(folder: Path, outcome: ExchangeOutcome) -> Path:
    """Environment, method, ceilings and rows as `bench_exchange.json` in the folder."""
    described = (exchange_loops, exchange_operands, exchange_calls, exchange_peers)
    method = "\n".join(module.__doc__ or "" for module in described)
    return write(folder / JSON, outcome, records(outcome), method)
