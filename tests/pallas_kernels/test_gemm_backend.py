"""Which kernels run where, and what is said where they cannot."""

import jax.numpy as jnp
import pytest

from pallas_kernels import (
    bf16_gemm,
    device,
    fp8_gemm,
    gemm_backend,
    gemm_reference,
    grouped_gemm,
    quantize_tiles,
    sm90_gemm,
)
from tests import products

CALLS = {
    "fp8_gemm": lambda: fp8_gemm(*products.fp8_dense(8, 16, 128), backend="mosaic_gpu"),
    "bf16_gemm": lambda: bf16_gemm(*products.bf16_pair((8, 16), (8, 16)), backend="mosaic_gpu"),
    "quantize": lambda: quantize_tiles(jnp.ones((8, 16)), backend="mosaic_gpu"),
    "grouped_gemm": lambda: grouped_gemm(
        jnp.ones((128, 128), jnp.bfloat16), jnp.ones((1, 128, 128), jnp.bfloat16),
        jnp.array([128], jnp.int32), backend="mosaic_gpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_kernels_are_refused_where_they_cannot_run(call, monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: 8.0)
    with pytest.raises(ValueError, match=r"backend is 'mosaic_gpu': .* need a Hopper GPU"):
        call()


@pytest.mark.parametrize(("capability", "module"), [(9.0, sm90_gemm), (8.9, gemm_reference)])
def test_auto(capability, module, monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: capability)
    assert gemm_backend.products("auto") is module
    assert gemm_backend.products("reference") is gemm_reference


def test_unknown():
    with pytest.raises(ValueError, match="backend is 'cublas': use one of auto, mosaic_gpu"):
        gemm_backend.products("cublas")
