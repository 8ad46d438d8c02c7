"""What a benchmark found as flat records, and the JSON file that holds them."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import jax

from dsjax.bench import timing
from dsjax.bench.ceilings import XLA_BF16, XLA_FP8
from dsjax.bench.peers import Peers, median_factor
from dsjax.bench.rows import OURS, Outcome, Row
from dsjax.bench.shapes import Work, work
from pallas_kernels.device import is_hopper

JSON = "bench_gemm.json"


def records(outcome: Outcome, peers: Peers) -> list[dict[str, Any]]:
    """One flat dict a row: seconds as microseconds, ratios, and what they were made from."""
    factors = [_own_factor(row, peers) for row in outcome.rows]
    median = median_factor(factors)
    return [
        _record(row, outcome, peers, own or median)
        for row, own in zip(outcome.rows, factors, strict=True)
    ]


def _own_factor(row: Row, peers: Peers) -> float | None:
    return peers.card_factor(row.shape, row.seconds(XLA_FP8)) if row.kind == "dense" else None


def _record(row: Row, outcome: Outcome, peers: Peers, factor: float) -> dict[str, Any]:
    each, seconds = work(row.kind, row.shape), row.seconds()
    found = figures(row, each)
    if seconds is None:
        return found
    deepgemm = peers.deepgemm(row.kind, row.shape)
    scaled = peers.scaled_deepgemm(row.kind, row.shape, factor)
    cublas = peers.cublas_fp8(row.shape) if row.kind == "dense" else None
    return found | {
        "share_of_ceiling": outcome.ceilings.least_seconds(row.kind, each) / seconds,
        "xla_fp8_us": micro(row.seconds(XLA_FP8)), "xla_bf16_us": micro(row.seconds(XLA_BF16)),
        "recorded_cublas_fp8_us": micro(cublas), "recorded_deepgemm_us": micro(deepgemm),
        "card_factor": factor if scaled else None,
        "times_deepgemm": scaled / seconds if scaled else None,
    }  # fmt: skip


def figures(row: Row, each: Work) -> dict[str, Any]:
    """What the record of a row has in every benchmark, the rates only where it was timed."""
    found: dict[str, Any] = {
        "kind": row.kind, "shape": str(row.shape), "flops": each.flops, "bytes": each.bytes,
        "intensity": each.intensity, "relative_error": row.error, "note": row.note,
        "failed": row.failed,
    }  # fmt: skip
    if (ours := row.timings.get(OURS)) is None:
        return found
    return found | {
        "us": ours.seconds * 1e6, "us_passes": [of_pass * 1e6 for of_pass in ours.passes],
        "timed_by": ours.how, "tflops": each.flops / ours.seconds / 1e12,
        "gbytes_per_s": each.bytes / ours.seconds / 1e9,
    }  # fmt: skip


def micro(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def write_json(folder: Path, outcome: Outcome, peers: Peers) -> Path:
    """Environment, method, ceilings and rows as `bench_gemm.json` in the folder."""
    return write(folder / JSON, outcome, records(outcome, peers))


def write(
    path: Path, outcome: Outcome, found: list[dict[str, Any]], method: str | None = timing.__doc__
) -> Path:
    """The JSON file of any benchmark, with these records as its rows."""
    content = {
        "environment": environment(),
        "method": {
            "description": method,
            "warm_s": outcome.method.warm, "stretch_s": outcome.method.stretch,
            "stretches": outcome.method.stretches, "passes": outcome.method.passes,
            "short_call_us": outcome.method.short_call * 1e6,
        },
        "ceilings": {
            "fp8_tflops": outcome.ceilings.fp8 / 1e12,
            "bf16_tflops": outcome.ceilings.bf16 / 1e12,
            "copy_gbytes_per_s": outcome.ceilings.bandwidth / 1e9,
        },
        "interrupted": outcome.interrupted,
        "rows": found,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Card, driver, versions, date, and whether kernels or their references ran."""
    driver = Path("/proc/driver/nvidia/version")
    version = re.search(r"\b\d{3}\.[\d.]+\b", driver.read_text()) if driver.is_file() else None
    return {
        "device": jax.devices()[0].device_kind,
        "driver": version.group() if version else None,
        "jax": jax.__version__,
        "platform": jax.devices()[0].client.platform_version,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernels": is_hopper(),
    }
