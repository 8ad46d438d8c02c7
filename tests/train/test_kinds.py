"""Operations are told by their names, matmuls by their scopes."""

import pytest

from dsjax.train import kinds
from dsjax.train.kinds import KINDS, is_backward, is_fp8, kind_of, scope_of

FORWARD = "jit(step)/jvp()/while/body/eval_jaxpr"
BACKWARD = "jit(step)/transpose(jvp())/while/body/eval_jaxpr"
DOT = "dot_general"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mla_forward_mosaic_gpu_kernel", kinds.ATTENTION_FORWARD),
        ("mla_backward_mosaic_gpu_kernel", kinds.ATTENTION_BACKWARD),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", kinds.ATTENTION_FORWARD),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", kinds.ATTENTION_BACKWARD),
        ("bf16_gemm_grouped_mosaic_gpu_kernel", kinds.EXPERTS),
        ("bf16_grouped_wgrad_mosaic_gpu_kernel", kinds.EXPERTS),
        ("fp8_gemm_grouped_mosaic_gpu_kernel", kinds.EXPERTS),
        ("fp8_gemm_k_grouped_mosaic_gpu_kernel", kinds.EXPERTS),
        ("bf16_gemm_softmax_mosaic_gpu_kernel", kinds.HEAD),
        ("fp8_gemm_dense_mosaic_gpu_kernel", kinds.MATMUL),
        ("fp8_gemm_dense_beside_dispatch_quantized_mosaic_gpu_kernel", kinds.BESIDE),
        ("fp8_gemm_dense_beside_combine_push_mosaic_gpu_kernel", kinds.BESIDE),
        ("dispatch_quantized_mosaic_gpu_kernel", kinds.COLLECTIVE),
        ("combine_push_mosaic_gpu_kernel", kinds.COLLECTIVE),
        ("expert_layout_mosaic_gpu_kernel", kinds.COLLECTIVE),
        ("combine_rows_mosaic_gpu_kernel", kinds.ORDER),
        ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", kinds.MATMUL),
        ("nvjet_sm90_tss_128x256_64x4_2x1_v_bz_coopA_TNN", kinds.MATMUL),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_tilesize32x32x8", kinds.MATMUL),
        ("gemm_fusion_dot_131", kinds.MATMUL),
        ("void cublasLt::splitKreduce_kernel<32, 16>", kinds.MATMUL),
        ("dot.5", kinds.MATMUL),
        ("quantize_tiles_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("quantize_blocks_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("quantize_both_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("requantize_transposed_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("swiglu_quantize_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("rmsnorm_quantize_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("gather_quantized_mosaic_gpu_kernel", kinds.ORDER),
        ("spread_quantized_mosaic_gpu_kernel", kinds.ORDER),
        ("swiglu_quantize_both_mosaic_gpu_kernel", kinds.QUANTISATION),
        ("swiglu_backward_mosaic_gpu_kernel", kinds.ELEMENTWISE),
        ("sort_20_1", kinds.ORDER),
        ("void cub::DeviceRadixSortOnesweepKernel<>", kinds.ORDER),
        ("loop_gather_fusion", kinds.ORDER),
        ("wrapped_scatter", kinds.ORDER),
        ("input_reduce_fusion_4", kinds.REDUCTION),
        ("input_add_reduce_fusion", kinds.REDUCTION),
        ("loop_dynamic_update_slice_fusion_27", kinds.COPY),
        ("bitcast_dynamic-update-slice_fusion.3", kinds.COPY),
        ("loop_concatenate_fusion", kinds.COPY),
        ("wrapped_transpose", kinds.COPY),
        ("copy.12", kinds.COPY),
        ("MemcpyD2D", kinds.COPY),
        ("memcpy128", kinds.COPY),
        ("Memset", kinds.COPY),
        ("loop_add_convert_fusion_1", kinds.ELEMENTWISE),
        ("loop_convert_fusion", kinds.ELEMENTWISE),
        ("loop_add_slice_fusion", kinds.ELEMENTWISE),
        ("wrapped_convert", kinds.ELEMENTWISE),
        ("fusion_12", kinds.ELEMENTWISE),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", kinds.COLLECTIVE),
        ("all-gather-start.2", kinds.COLLECTIVE),
        ("reduce-scatter.2", kinds.COLLECTIVE),
        ("while.3", kinds.CONTROL),
        ("call", kinds.CONTROL),
        ("custom-call.7", kinds.OTHER),
        ("some_new_kernel", kinds.OTHER),
    ],
)
def test_a_name_alone_tells_the_kind(name, kind):
    assert kind_of(name) == kind
    assert kind in KINDS


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        (f"{FORWARD}/mla_attention/jit(forward)/bihq,bjhq->bhij/{DOT}", kinds.ATTENTION_FORWARD),
        (f"{BACKWARD}/mla_attention/jit(backward)/bhij,bihq->bjhq/{DOT}", kinds.ATTENTION_BACKWARD),
        (f"{BACKWARD}/routed_experts/amk,akn->amn/{DOT}", kinds.EXPERTS),
        (f"jit(step)/transpose(jvp(head))/...d,...p->dp/{DOT}", kinds.HEAD),
        (f"jit(step)/jvp()/btd,dp->btp/{DOT}", kinds.HEAD),
        (f"{FORWARD}/mla_query/btd,dhq->bthq/{DOT}", kinds.DENSE),
        ("dot", kinds.MATMUL),
    ],
)
def test_matmuls_are_told_apart_by_scope(op_name, kind):
    for name in ("nvjet_sm90_tst_128x160_64x5_2x1_v_bz_NNT", "gemm_fusion_dot_131", "ynn_fusion.3"):
        assert kind_of(name, op_name) == kind


def test_a_nameless_fusion_is_what_it_ends_in():
    assert kind_of("fusion.7", f"{FORWARD}/combine/reduce_sum") == kinds.REDUCTION
    assert kind_of("fusion.7", f"{FORWARD}/dispatch/gather") == kinds.ORDER
    assert kind_of("fusion.7", f"{FORWARD}/mla_out/mul") == kinds.ELEMENTWISE
    assert kind_of("some_new_kernel", f"{FORWARD}/pallas_call") == kinds.OTHER


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/transpose(jvp(mtp))/router/td,de->te/dot_general", "mtp/router, backward"),
        (f"{FORWARD}/mla_attention/jit(forward)/while/body/add", "mla_attention"),
        (f"{BACKWARD}/mul", "backward"),
        ("jit(step)/mul", ""),
        ("jit(step)/jvp(embed)/gather;jit(step)/jvp(head)/mul", "embed"),
        ("state.params['norm']", ""),
        ("", ""),
    ],
)
def test_scopes_are_read_without_what_is_not_named(op_name, scope):
    assert scope_of(op_name) == scope


def test_what_is_computed_again_is_no_backward():
    again = "jit(step)/jvp()/while/body/rematted_computation/mla_query/btd,dhq->bthq/dot_general"
    assert not is_backward(again)
    assert scope_of(again) == "mla_query"


def test_fp8_is_in_the_name():
    assert is_fp8("fp8_gemm_dense_mosaic_gpu_kernel")
    assert not is_fp8("bf16_gemm_grouped_mosaic_gpu_kernel")
