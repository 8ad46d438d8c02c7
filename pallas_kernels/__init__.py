"""Kernels and their jnp references: pure functions of arrays that know nothing of dsjax."""

from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.grouped_gemm import grouped_gemm

__all__ = ["causal_attention", "grouped_gemm"]
