"""What `run.py bench training` found as flat records, and the JSON file that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.bench import timing, training_calls, training_operands
from dsjax.bench.records import figures, micro, write
from dsjax.bench.rows import Outcome, Row
from dsjax.bench.training import XLA
from dsjax.bench.training_calls import work
from dsjax.bench.training_shapes import Kind, Shape

JSON = "bench_training.json"


def records(outcome: Outcome[Kind, Shape]) -> list[dict[str, Any]]:
    """One flat dict a row: seconds as microseconds, ratios, and what they were made from.

    A share is the least time that the ceilings allow over the time taken; times_xla above 1 says
    that ours is faster.
    """
    return [_record(row, outcome) for row in outcome.rows]


def _record(row: Row[Kind, Shape], outcome: Outcome[Kind, Shape]) -> dict[str, Any]:
    each, seconds, xla = work(row.kind, row.shape), row.seconds(), row.seconds(XLA)
    found = figures(row, each)
    if seconds is None:
        return found
    least = outcome.ceilings.least_seconds("bf16", each)
    return found | {
        "share_of_ceiling": least / seconds, "xla_us": micro(xla),
        "xla_share_of_ceiling": least / xla if xla else None,
        "times_xla": xla / seconds if xla else None,
    }  # fmt: skip


def write_json(folder: Path, outcome: Outcome[Kind, Shape]) -> Path:
    """Environment, method, ceilings and rows as `bench_training.json` in the folder."""
    described = (timing, training_operands, training_calls)
    method = "\n".join(module.__doc__ or "" for module in described)
    return write(folder / JSON, outcome, records(outcome), method)
