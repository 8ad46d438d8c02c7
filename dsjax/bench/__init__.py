"""Benchmarks of the kernels: figures, the ceilings of the card they ran on, and recorded peers."""

from dsjax.bench.gemm import Settings, bench_gemm
from dsjax.bench.report import run_gemm

__all__ = ["Settings", "bench_gemm", "run_gemm"]
