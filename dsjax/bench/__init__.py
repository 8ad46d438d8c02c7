"""Benchmarks of the kernels: figures, the ceilings of the card they ran on, and recorded peers."""

from dsjax.bench.gemm import Settings, bench_gemm
from dsjax.bench.mla import MlaSettings, bench_mla
from dsjax.bench.mla_report import run_mla
from dsjax.bench.report import run_gemm

__all__ = ["MlaSettings", "Settings", "bench_gemm", "bench_mla", "run_gemm", "run_mla"]
