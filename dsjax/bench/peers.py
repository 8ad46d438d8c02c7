"""Recorded times of DeepGEMM and cuBLAS, and how this card compares with the one they ran on."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from importlib.resources import files

from dsjax.bench.shapes import Kind, Shape

DEEPGEMM: dict[Kind, str] = {
    "dense": "deepgemm_dense",
    "grouped": "deepgemm_grouped_contiguous",
    "masked": "deepgemm_grouped_masked",
}
CUBLAS_FP8 = "cublas_fp8_tensor"


class Peers:
    """Recorded seconds a call by peer and shape: `peers.csv` says how they were taken."""

    def __init__(self, seconds: dict[tuple[str, str], float] | None = None):
        self._seconds = read() if seconds is None else seconds

    def deepgemm(self, kind: Kind, shape: Shape) -> float | None:
        return self._seconds.get((DEEPGEMM.get(kind, ""), str(shape)))

    def cublas_fp8(self, shape: Shape) -> float | None:
        return self._seconds.get((CUBLAS_FP8, str(shape)))

    def card_factor(self, shape: Shape, xla_fp8: float | None) -> float | None:
        """XLA's FP8 matmul of a dense shape now over cuBLAS's then: above 1 on a slower card."""
        recorded = self.cublas_fp8(shape)
        return xla_fp8 / recorded if xla_fp8 and recorded else None

    def scaled_deepgemm(self, kind: Kind, shape: Shape, factor: float) -> float | None:
        """Seconds that DeepGEMM would take on this card."""
        recorded = self.deepgemm(kind, shape)
        return recorded * factor if recorded else None


def median_factor(factors: Iterable[float | None]) -> float:
    """For shapes that XLA has no FP8 matmul for; 1 where no dense shape gave a factor."""
    known = [factor for factor in factors if factor is not None]
    return statistics.median(known) if known else 1.0


def read(name: str = "peers.csv") -> dict[tuple[str, str], float]:
    """Seconds by (kernel, shape) of a file of this package."""
    text = files("dsjax.bench").joinpath(name).read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {
        (row["kernel"], row["shape"]): float(row["us_sustained"]) * 1e-6
        for row in csv.DictReader(lines)
    }
