"""What `run.py bench mla` found as flat records, beside recorded peers and rows of the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsjax.bench import mla_decode, mla_prefill, paged_cache, timing
from dsjax.bench.mla_decode import EQUAL
from dsjax.bench.mla_prefill import CUDNN
from dsjax.bench.mla_shapes import Kind, Shape, work
from dsjax.bench.peers import read
from dsjax.bench.records import figures, micro, write
from dsjax.bench.rows import Outcome, Row

JSON = "bench_mla.json"
FLASHMLA: dict[Kind, str] = {"decode": "flashmla_dense", "sparse": "flashmla_sparse_fp8"}
CUDNN_TORCH: dict[Kind, str] = {"forward": "cudnn_forward", "backward": "cudnn_backward"}
PLAIN: dict[Kind, Kind] = {"packed_forward": "forward", "packed_backward": "backward"}


class MlaPeers:
    """Recorded seconds a call by kernel and shape: `mla_peers.csv` says how they were taken."""

    def __init__(self, seconds: dict[tuple[str, str], float] | None = None):
        self._seconds = read("mla_peers.csv") if seconds is None else seconds

    def flashmla(self, kind: Kind, shape: Shape) -> float | None:
        return self._seconds.get((FLASHMLA.get(kind, ""), str(shape)))

    def cudnn(self, kind: Kind, shape: Shape) -> float | None:
        return self._seconds.get((CUDNN_TORCH.get(kind, ""), str(shape)))


def records(outcome: Outcome[Kind, Shape], peers: MlaPeers) -> list[dict[str, Any]]:
    """One flat dict a row: seconds as microseconds, ratios, and what they were made from.

    A ratio is the peer's time over ours: above 1 ours is faster.
    """
    known = {(row.kind, row.shape): row.seconds() for row in outcome.rows}
    return [_record(row, outcome, peers, known) for row in outcome.rows]


def _record(
    row: Row[Kind, Shape],
    outcome: Outcome[Kind, Shape],
    peers: MlaPeers,
    known: dict[tuple[Kind, Shape], float | None],
) -> dict[str, Any]:
    each, seconds, ceilings = work(row.kind, row.shape), row.seconds(), outcome.ceilings
    found = figures(row, each)
    if seconds is None:
        return found
    bf16_cache = known.get(("decode", row.shape)) if row.kind == "fp8" else None
    unpacked = known.get((PLAIN[row.kind], row.shape)) if row.kind in PLAIN else None
    flashmla, cudnn = peers.flashmla(row.kind, row.shape), peers.cudnn(row.kind, row.shape)
    return found | {
        "share_of_copy": each.bytes / seconds / ceilings.bandwidth,
        "share_of_bf16": each.flops / seconds / ceilings.bf16,
        "cudnn_us": micro(row.seconds(CUDNN)), "equal_lengths_us": micro(row.seconds(EQUAL)),
        "bf16_cache_us": micro(bf16_cache), "unpacked_us": micro(unpacked),
        "recorded_flashmla_us": micro(flashmla),
        "times_flashmla": flashmla / seconds if flashmla else None,
        "recorded_cudnn_us": micro(cudnn),
        "times_recorded_cudnn": cudnn / seconds if cudnn else None,
    }  # fmt: skip


def write_json(folder: Path, outcome: Outcome[Kind, Shape], peers: MlaPeers) -> Path:
    """Environment, method, ceilings and rows as `bench_mla.json` in the folder."""
    described = (timing, mla_decode, paged_cache, mla_prefill)
    method = "\n".join(module.__doc__ or "" for module in described)
    return write(folder / JSON, outcome, records(outcome, peers), method)
