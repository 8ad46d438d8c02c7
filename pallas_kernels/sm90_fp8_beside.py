"""FP8 products whose kernels move rows between ranks meanwhile, on Hopper."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import sm90_expert_dispatch, sm90_expert_push, sm90_gemm
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import Peers
from pallas_kernels.sm90_traffic import Traffic

DISPATCH_CTAS, COMBINE_CTAS = 40, 64
"""Of 132: an estimate for links, which none has measured; within one card fewer are better."""


@lowered_once
def dispatch_quantized(
    operands: tuple[jax.Array, ...], q: jax.Array, scale: jax.Array, slots: jax.Array,
    tokens: jax.Array, count: jax.Array, *, rows: int, peers: Peers, ctas: int, by_row: bool,
    out_dtype: Any, sum_bits: int | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:  # fmt: skip
    """The product of `operands`, and `sm90_expert_dispatch.dispatch_quantized`."""
    traffic = sm90_expert_dispatch.traffic(
        "dispatch_quantized", q, scale, slots, tokens, count, rows, peers, ctas
    )
    product, (rows_q, rows_scale) = _multiply(traffic, operands, by_row, out_dtype, sum_bits)
    return product, (rows_q, rows_scale[:, : scale.shape[1]])


@lowered_once
def combine_push(
    operands: tuple[jax.Array, ...], y: jax.Array, slots: jax.Array, weights: jax.Array | None,
    ranks: jax.Array, *, peers: Peers, ctas: int, by_row: bool, out_dtype: Any,
    sum_bits: int | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The product of `operands`, and `sm90_expert_push.combine_push`."""
    traffic = sm90_expert_push.traffic(y, slots, weights, ranks, peers, ctas)
    product, (_, sums) = _multiply(traffic, operands, by_row, out_dtype, sum_bits)
    return product, sums


def _multiply(
    traffic: Traffic, operands: tuple[jax.Array, ...], by_row: bool, out_dtype: Any,
    sum_bits: int | None,
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    multiply = sm90_gemm.fp8_wgrad_beside if by_row else sm90_gemm.fp8_dense_beside
    return multiply(traffic, *operands, out_dtype, sum_bits)
