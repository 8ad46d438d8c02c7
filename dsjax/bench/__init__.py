"""Benchmarks of the kernels: figures, the ceilings of the card they ran on, and recorded peers."""

from dsjax.bench.gemm import Settings, bench_gemm
from dsjax.bench.mla import MlaSettings, bench_mla
from dsjax.bench.mla_report import run_mla
from dsjax.bench.report import run_gemm
from dsjax.bench.training import TrainingSettings, bench_training
from dsjax.bench.training_report import run_training
from dsjax.bench.training_shapes import Sizes

__all__ = [
    "MlaSettings",
    "Settings",
    "Sizes",
    "TrainingSettings",
    "bench_gemm",
    "bench_mla",
    "bench_training",
    "run_gemm",
    "run_mla",
    "run_training",
]
