"""Attention of new tokens to a paged cache of latents: MLA's decode (DeepSeek-V2, arXiv 2405.04434,
section 2.1; FlashMLA's dense decode).

Queries are absorbed, so that a cached token is one key for all heads and its first 512 columns are
the value. Requests of any lengths are dealt evenly to a GPU's SMs by a plan that the device makes;
it holds for all layers of a decode step, which share the lengths.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels import checks, device, gemm_backend, mla_decode_reference, sm90_mla_plan
from pallas_kernels.checks import ceil_div
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.latent_cache import BYTES, LATENT, PAGE, WIDTH
from pallas_kernels.sm90_mla_plan import Plan

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float32, Int32, UInt8

    Cache = BFloat16[Array, "pages 64 576"] | UInt8[Array, "pages 64 656"]

ROW_BLOCK = 64  # query rows that an SM attends with
USUAL_SMS = 132  # H100, H200; for plans made where there is no GPU


def mla_decode(
    q: BFloat16[Array, "b s h 576"],
    cache: Cache,
    block_table: Int32[Array, "b max_pages"],
    lengths: Int32[Array, " b"],
    *,
    scale: float,
    causal: bool = True,
    plan: Plan | None = None,
    backend: Backend = "auto",
) -> tuple[BFloat16[Array, "b s h 512"], Float32[Array, "b s h"]]:
    """(out, lse): softmax(scale * q k^T) v, and the natural logarithm of the softmax's sums.

    The s queries of a request, one or as many as were speculated, are those of its last tokens,
    which are in the cache and counted in `lengths`. causal: query i sees the keys below
    lengths - (s - 1 - i); else all see all. A query without keys, as in a request of length 0, gets
    out 0 and lse +inf. q is bfloat16 [b, s, h, 576]; the cache bfloat16 [pages, 64, 576], or uint8
    [pages, 64, 656] as `latent_cache` says, which is rounded to bfloat16 before it is used. The
    token at position p lies in row p % 64 of page `block_table[b, p // 64]`. What lies behind a
    length, of the table or the cache, may hold anything, NaN too. out is bfloat16 [b, s, h, 512],
    lse float32 [b, s, h].

    plan: what `plan_mla_decode` made of the same lengths, queries and heads; made here if None.

    On Hopper the kernels run, elsewhere the jnp reference, in float32 and slow. Queries may be many
    (a chunk of a prompt whose latents are in the cache). Out depends in its last bits on how
    requests are split, so on their neighbours. Inside `jax.shard_map` pass it `check_vma=False`.
    Raises ValueError on dtypes, shapes, a scale, plan or backend that do not fit, and for lengths
    or pages in use that table and cache do not have; values that are being traced (under jit)
    cannot be checked. TypeError when differentiated.
    """
    _check(q, cache, block_table, lengths, scale)
    b, s, h, _ = q.shape
    if plan is not None:
        _check_plan(plan, b, s, h)
    kernels = gemm_backend.takes_kernels(backend)
    q, cache = _constant(q, cache)
    if not (q.size and cache.size and block_table.size):
        return jnp.zeros((b, s, h, LATENT), q.dtype), jnp.full((b, s, h), jnp.inf, jnp.float32)
    operands = q, cache, block_table, lengths
    if not kernels:
        return mla_decode_reference.decode(*operands, scale=scale, causal=causal)
    if plan is None:
        plan = plan_mla_decode(lengths, queries=s, heads=h)
    return _on_hopper(*operands, plan, float(scale), causal and s > 1)


def plan_mla_decode(
    lengths: Int32[Array, " b"],
    *,
    queries: int,
    heads: int,
    max_length: int | None = None,
    debug: bool = False,
) -> Plan:
    """How `mla_decode` deals requests of those lengths, with so many queries (s) and heads (h).

    Small integer work on the device, for a jitted step to do once for its layers. The plan fits the
    GPU that it is made on. Raises ValueError on lengths that are not int32 [b], on known ones
    outside 0 to max_length, and on queries or heads below 1. With debug=True lengths that are being
    traced are checked too, on the host whenever the plan is made: the program then fails with the
    ValueError's text.
    """
    checks.array("lengths", lengths, "[b]", jnp.int32)
    for name, value in dict(queries=queries, heads=heads).items():
        if value < 1:
            raise ValueError(f"{name} is {value}: expected 1 or more")
    if not isinstance(lengths, Tracer):
        _check_lengths(lengths, max_length)
    elif debug:
        jax.debug.callback(functools.partial(_check_lengths, most=max_length), lengths)
    some = lengths if lengths.size else jnp.zeros(1, jnp.int32)
    return sm90_mla_plan.plan(some, _parts(queries * heads))


def _on_hopper(
    q: jax.Array, cache: jax.Array, block_table: jax.Array, lengths: jax.Array, plan: Plan,
    scale: float, causal: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    from pallas_kernels import sm90_mla_combine, sm90_mla_decode

    b, s, h, _ = q.shape
    rows = s * h
    by_page = cache.dtype == jnp.bfloat16
    if not by_page:
        cache = cache.reshape(-1, BYTES)
    call = sm90_mla_decode.Decode(
        rows, h, scale, not causal, pair=by_page and _paired(rows),
        source="pages" if by_page else "tokens",
    )  # fmt: skip
    rows_first = q.reshape(b, rows, WIDTH)
    pieces = sm90_mla_decode.decode(rows_first, cache, block_table, lengths, plan, call)
    out, lse = sm90_mla_combine.combine(*pieces, plan, sms=_sms())
    out, lse = out.reshape(b, s, h, LATENT), lse.reshape(b, s, h)
    return out, lse


def _paired(rows: int) -> bool:
    """Whether two blocks of rows share their pages, as a cluster: no block may be left over."""
    return ceil_div(rows, ROW_BLOCK) % 2 == 0


def _parts(rows: int) -> int:
    """How many SMs there are for each block of rows."""
    return max(_sms() // ceil_div(rows, ROW_BLOCK), 1)


def _sms() -> int:
    return jax.devices()[0].core_count if device.is_gpu() else USUAL_SMS


def _check(
    q: jax.Array, cache: jax.Array, block_table: jax.Array, lengths: jax.Array, scale: Any
) -> None:
    if not isinstance(scale, numbers.Real) or not 0 < float(scale) < math.inf:
        raise ValueError(f"scale is {scale}: expected a positive number, known when tracing")
    checks.array("q", q, "[b, s, h, 576]", jnp.bfloat16)
    checks.exact("q", q, (*q.shape[:3], WIDTH), jnp.bfloat16)
    b, s, h, _ = q.shape
    if not s * h:
        raise ValueError(f"q is {q.shape}: expected one query (s) and head (h) at least")
    checks.array("cache", cache, "[pages, 64, 576 or 656]", jnp.bfloat16, jnp.uint8)
    width = BYTES if cache.dtype == jnp.uint8 else WIDTH
    checks.exact("cache", cache, (cache.shape[0], PAGE, width), cache.dtype)
    checks.array("block_table", block_table, "[b, max_pages]", jnp.int32)
    checks.exact("block_table", block_table, (b, block_table.shape[1]), jnp.int32)
    checks.exact("lengths", lengths, (b,), jnp.int32)
    if not isinstance(lengths, Tracer):
        _check_lengths(lengths, block_table.shape[1] * PAGE, ", 64 x max_pages")
        if not isinstance(block_table, Tracer):
            _check_table(np.asarray(block_table), np.asarray(lengths), cache.shape[0])


def _check_lengths(lengths: jax.Array, most: int | None, because: str = "") -> None:
    known = np.asarray(lengths)
    wrong = (known < 0) | (known > (np.inf if most is None else most))
    for i in np.flatnonzero(wrong)[:1]:
        wanted = "0 or more" if most is None else f"0 to {most}{because}"
        raise ValueError(f"lengths[{i}] is {known[i]}: expected {wanted}")


def _check_table(table: np.ndarray, lengths: np.ndarray, pages: int) -> None:
    used = np.arange(table.shape[1]) < ceil_div(lengths, PAGE)[:, None]
    for b, slot in np.argwhere(used & ((table < 0) | (table >= pages)))[:1]:
        raise ValueError(
            f"block_table[{b}, {slot}] is {table[b, slot]}, in use as lengths[{b}] is "
            f"{lengths[b]}: expected 0 to {pages - 1}, a page of the cache"
        )


def _check_plan(plan: Plan, b: int, s: int, h: int) -> None:
    parts = _parts(s * h)
    if plan.parts != parts:
        raise ValueError(
            f"plan is of {plan.parts} parts: expected {parts}, as `plan_mla_decode` makes here for "
            f"{s} queries and {h} heads"
        )
    checks.exact("plan.starts", plan.starts, (parts + 1, 3), jnp.int32)
    checks.exact("plan.splits", plan.splits, (parts, 3), jnp.int32)
    checks.exact("plan.count", plan.count, (1,), jnp.int32)
    if b and not isinstance(plan.starts, Tracer):
        requests = np.asarray(plan.starts)[-1, 0]
        if requests != b:
            raise ValueError(f"plan is of {requests} requests: expected b = {b}")


@jax.custom_jvp
def _constant(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


@_constant.defjvp
def _refuse_gradient(primals: tuple, tangents: tuple) -> NoReturn:
    raise TypeError("mla_decode is not differentiable: use mla_attention")
