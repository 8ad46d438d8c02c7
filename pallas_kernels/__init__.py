"""Kernels and their jnp references: pure functions of arrays that know nothing of dsjax."""

from pallas_kernels.bf16_gemm import (
    bf16_gemm,
    bf16_grouped_gemm,
    bf16_grouped_wgrad,
    bf16_masked_gemm,
)
from pallas_kernels.causal_attention import causal_attention
from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm, fp8_masked_gemm
from pallas_kernels.fp8_linear import fp8_grouped_linear, fp8_linear
from pallas_kernels.fp8_wgrad import fp8_grouped_wgrad, fp8_wgrad
from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.quantize import (
    dequantize,
    padded_rows,
    quantize_blocks,
    quantize_both,
    quantize_tiles,
    requantize_transposed,
    rmsnorm_quantize,
    swiglu_quantize,
)

__all__ = [
    "bf16_gemm",
    "bf16_grouped_gemm",
    "bf16_grouped_wgrad",
    "bf16_masked_gemm",
    "causal_attention",
    "dequantize",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_grouped_linear",
    "fp8_grouped_wgrad",
    "fp8_linear",
    "fp8_masked_gemm",
    "fp8_wgrad",
    "grouped_gemm",
    "padded_rows",
    "quantize_blocks",
    "quantize_both",
    "quantize_tiles",
    "requantize_transposed",
    "rmsnorm_quantize",
    "swiglu_quantize",
]
