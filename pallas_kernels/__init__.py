"""Kernels and their jnp references: pure functions of arrays that know nothing of dsjax."""

from pallas_kernels.bf16_gemm import (
    bf16_gemm,
    bf16_grouped_gemm,
    bf16_grouped_wgrad,
    bf16_masked_gemm,
)
from pallas_kernels.fp8_experts import fp8_experts
from pallas_kernels.fp8_gemm import fp8_gemm, fp8_grouped_gemm, fp8_masked_gemm
from pallas_kernels.fp8_layers import fp8_mlp, fp8_project
from pallas_kernels.fp8_linear import fp8_grouped_linear, fp8_linear
from pallas_kernels.fp8_weight import Fp8Weight, quantize_weight
from pallas_kernels.fp8_wgrad import fp8_grouped_wgrad, fp8_wgrad
from pallas_kernels.grouped_gemm import grouped_gemm
from pallas_kernels.index_cache import append_index_keys
from pallas_kernels.latent_cache import (
    append_latents,
    dequantize_latent_cache,
    quantize_latent_cache,
    write_latents,
)
from pallas_kernels.lightning_indexer import (
    hadamard,
    index_logits,
    index_topk,
    paged_index_logits,
    quantize_index,
)
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode, plan_mla_decode
from pallas_kernels.mla_sparse import mla_sparse_decode, mla_sparse_prefill
from pallas_kernels.permute import (
    combine_rows,
    gather_quantized,
    gather_rows,
    spread_quantized,
    spread_rows,
)
from pallas_kernels.quantize import (
    dequantize,
    padded_rows,
    quantize_blocks,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
    requantize_transposed,
    rmsnorm_quantize,
    swiglu_quantize,
)

__all__ = [
    "Fp8Weight",
    "append_index_keys",
    "append_latents",
    "bf16_gemm",
    "bf16_grouped_gemm",
    "bf16_grouped_wgrad",
    "bf16_masked_gemm",
    "combine_rows",
    "dequantize",
    "dequantize_latent_cache",
    "fp8_experts",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_grouped_linear",
    "fp8_grouped_wgrad",
    "fp8_linear",
    "fp8_masked_gemm",
    "fp8_mlp",
    "fp8_project",
    "fp8_wgrad",
    "gather_quantized",
    "gather_rows",
    "grouped_gemm",
    "hadamard",
    "index_logits",
    "index_topk",
    "linear_cross_entropy",
    "mla_attention",
    "mla_decode",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "padded_rows",
    "paged_index_logits",
    "plan_mla_decode",
    "quantize_blocks",
    "quantize_blocks_both",
    "quantize_both",
    "quantize_index",
    "quantize_latent_cache",
    "quantize_tiles",
    "quantize_transposed",
    "quantize_weight",
    "requantize_transposed",
    "rmsnorm_quantize",
    "spread_quantized",
    "spread_rows",
    "swiglu_quantize",
    "write_latents",
]
