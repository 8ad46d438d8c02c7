"""Attention to chosen tokens on Hopper: `sm90_mla_decode` with a request for every query."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import sm90_mla_combine, sm90_mla_decode
from pallas_kernels.checks import ceil_div
from pallas_kernels.sm90_mla_plan import STEP, Plan, plan
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
    lengths = np.full((t,), chosen.shape[1], np.int32)
    dealt = _known_plan(lengths, max(sms // ceil_div(h, sm90_mla_decode.ROWS), 1))
    lengths = jnp.asarray(lengths)
    pieces = sm90_mla_decode.decode(q, kv, chosen, lengths, dealt, call, interpret=interpret)
    if not dealt.count[0]:
        return pieces[0][:, :h], pieces[1]
    return sm90_mla_combine.combine(*pieces, dealt, sms=sms, interpret=interpret)


def _known_plan(lengths: np.ndarray, parts: int) -> Plan:
    """A constant of the program: all queries have as many tokens, so nothing is left to compute."""
    with jax.ensure_compile_time_eval():
        made = jax.jit(plan, static_argnums=1)(lengths, parts)
    return Plan(*map(np.asarray, made))
