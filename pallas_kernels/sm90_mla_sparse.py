"""Attention to chosen tokens on Hopper: `sm90_mla_decode` with a request for every query."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import sm90_mla_combine, sm90_mla_decode
from pallas_kernels.checks import ceil_div
from pallas_kernels.sm90_mla_plan import STEP, plan
from pallas_kernels.sm90_mla_schedule import sm_count


def decode(
    q: jax.Array, cache: jax.Array, indices: jax.Array, *, scale: float, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`mla_sparse_decode` of q [b, t, h, 576]."""
    b, t, h, width = q.shape
    tokens = cache.reshape(-1, cache.shape[-1])
    rows, chosen = q.reshape(b * t, h, width), indices.reshape(b * t, -1)
    out, lse = prefill(rows, tokens, chosen, scale=scale, sms=sms, interpret=interpret)
    return out.reshape(b, t, h, -1), lse.reshape(b, t, h)


def prefill(
    q: jax.Array, kv: jax.Array, indices: jax.Array, *, scale: float, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`mla_sparse_prefill` of q [t, h, 576]; kv may be FP8 tokens, uint8 [s, 656], too."""
    t, h, _ = q.shape
    sms = sms or sm_count()
    call = sm90_mla_decode.Decode(h, h, scale, True, source="chosen")
    chosen = jnp.pad(indices, ((0, 0), (0, -indices.shape[1] % STEP)), constant_values=-1)
    lengths = jnp.full((t,), chosen.shape[1], jnp.int32)
    dealt = plan(lengths, max(sms // ceil_div(h, sm90_mla_decode.ROWS), 1))
    pieces = sm90_mla_decode.decode(q, kv, chosen, lengths, dealt, call, interpret=interpret)
    return sm90_mla_combine.combine(*pieces, dealt, sms=sms, interpret=interpret)
