"""Attention of many queries at once, as multi-head latent attention needs it for prefill and
training (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys may be wider than values, and the rotary
part of the keys may be given once for all heads.

Causal or not, packed or not, every call comes down to one form: query i of a batch row sees the
keys [low_i, high_i). Kernel and reference take nothing else, and skip what lies outside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import checks, mla_attention_cudnn, mla_attention_reference
from pallas_kernels.gemm_backend import Backend, takes_kernels
from pallas_kernels.kept import kept

if TYPE_CHECKING:
    from typing import Any

    from jaxtyping import Array, Float, Int32

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
HOPPER_WIDTHS = ((192, 128), (128, 128), (64, 64))  # of queries and of values
HOPPER_ROPE = 64
HOPPER_KEYS = (1 << 22) - 128  # of a batch row: the kernel's table has 15 bits for a tile of 128
TILE = 128


def mla_attention(
    q: Float[Array, "*b t h q"],
    k: Float[Array, "*b s h n"],
    v: Float[Array, "*b s h v"] | None,
    *,
    scale: float,
    causal: bool = True,
    segment_ids: Int32[Array, "b t"] | None = None,
    cu_seqlens: Int32[Array, " segments+1"] | None = None,
    k_rope: Float[Array, "*b s r"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Array, "*b t h v"], Float[Array, "*b h t"]]:
    """(out, lse): softmax(scale * q k^T) v, and the natural logarithm of the softmax's sums.

    q [b, t, h, dq], k [b, s, h, dq] and v [b, s, h, dv] share a dtype, bfloat16, float16 or
    float32; out [b, t, h, dv] has it too, lse [b, h, t] is float32. Softmax and sums are float32.
    With k_rope [b, s, r] the last r columns of all heads' keys are k_rope, and k has only the
    dq - r in front of them; k_rope's gradient is summed over the heads in float32. Where v is None,
    k's columns behind those of the keys are the values, as one projection makes both, and the
    kernels take them apart where they lie.

    causal: query i sees keys up to s - t + i, so that the last query sees all. A query that sees
    none gets out 0 and lse +inf. Tokens of packed sequences see their own alone, and the kernels
    spend no time on what lies across:

    * segment_ids [b, t], s == t: a sequence is a run of equal ids (an id that comes back later in
      its row would start another sequence, and is refused where the values are known);
    * cu_seqlens [n + 1], from 0 to t without falling: sequence i is tokens
      [cu_seqlens[i], cu_seqlens[i + 1]) of q [t, h, dq], k, v and k_rope without a batch axis; out
      is [t, h, dv] and lse [h, t].

    On Hopper (dq, dv) of (192, 128), (128, 128) and (64, 64) in bfloat16, with r = 64 if any, take
    the kernels, which copy operands whose t or s is no multiple of 128. With backend="auto", causal
    attention of one sequence to itself (t == s, nothing packed) takes cuDNN on other GPUs and in
    other short floats and widths, as far as it has them; its lse is made by the reference, which
    jit drops where lse is not used. All else takes the jnp reference, in float32. Out and lse are
    differentiable, in reverse mode. Give each device its part of a sharded batch in
    `jax.shard_map`, with `check_vma=False`: XLA cannot divide a kernel. Raises ValueError on
    dtypes, shapes, scale, sequences or a backend that do not fit; sequences that are being traced
    (under jit) cannot be checked.
    """
    parts = _parts(q, k, v, k_rope)
    _check(q, *parts, k_rope, scale, segment_ids, cu_seqlens)
    kernel = _takes_kernel(backend, q, *parts, k_rope)
    if v is None and not kernel:
        k, v = jnp.split(k, [parts[0].shape[-1]], axis=-1)
    if cu_seqlens is not None:
        q, k = q[None], k[None]
        k_rope, v = (None if x is None else x[None] for x in (k_rope, v))
    b, t, h, _ = q.shape
    s, width = k.shape[1], parts[1].shape[-1]
    packed = segment_ids is not None or cu_seqlens is not None
    how = _How(float(scale), causal and not packed and s == t, kernel)
    takes = mla_attention_cudnn.takes
    cudnn = backend == "auto" and how.plain and not kernel and takes(q, parts[1])
    low, high = None, None
    if not (how.plain and how.kernel):
        low, high = _intervals(b, t, s, causal, segment_ids, cu_seqlens)
    if b and t and h and s and width:
        out, lse = _attend_padded(how, q, k, k_rope, v, low, high)
        if cudnn and v is not None:
            out = mla_attention_cudnn.attend_causally(q, k, k_rope, v, scale=how.scale)
    else:
        out = jnp.zeros((b, t, h, width), q.dtype)
        lse = jnp.full((b, h, t), jnp.inf, jnp.float32)
    return (out, lse) if cu_seqlens is None else (out[0], lse[0])


def _parts(
    q: jax.Array, k: jax.Array, v: jax.Array | None, k_rope: jax.Array | None
) -> tuple[Any, Any]:
    """Keys and values, or their shapes where they share an array."""
    if v is not None:
        return k, v
    checks.array("q", q, "[..., dq]", *FLOATS)
    rope = 0 if k_rope is None else k_rope.shape[-1]
    own = q.shape[-1] - rope
    values = k.shape[-1] - own
    if not 0 < own < k.shape[-1]:
        raise ValueError(
            f"k is {k.shape} without v: expected dq - r = {own} columns of keys, then the values'"
        )
    keys, values = (jax.ShapeDtypeStruct((*k.shape[:-1], n), k.dtype) for n in (own, values))
    return keys, values


@dataclasses.dataclass(frozen=True)
class _How:
    scale: float
    plain: bool  # causal, one sequence, t == s: the kernels need no intervals
    kernel: bool


def _attend_padded(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    k_rope: jax.Array | None,
    v: jax.Array | None,
    low: jax.Array | None,
    high: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The kernels want whole tiles. Queries behind the end see what the last one sees: intervals
    that never fall are what the backward kernel needs, and they cost no masks."""
    if not how.kernel:
        return _attend(how, q, k, k_rope, v, low, high)
    t = q.shape[1]
    k_rope, v = (None if x is None else _filled(x) for x in (k_rope, v))
    low, high = (None if x is None else _filled(x, mode="edge") for x in (low, high))
    out, lse = _attend(how, _filled(q), _filled(k), k_rope, v, low, high)
    return out[:, :t], lse[..., :t]


def _filled(x: jax.Array, **how: Any) -> jax.Array:
    extra = -x.shape[1] % TILE
    return jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)], **how) if extra else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    how: _How,
    q: jax.Array,
    k: jax.Array,
    k_rope: jax.Array | None,
    v: jax.Array | None,
    low: jax.Array | None,
    high: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    if not how.kernel:
        return mla_attention_reference.forward(q, k, k_rope, v, low, high, scale=how.scale)
    from pallas_kernels import sm90_mla_prefill

    return sm90_mla_prefill.forward(q, k, k_rope, v, low, high, how.plain, scale=how.scale)


def _forward(how: _How, *operands: Any) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    operands = tuple(None if x is None else x.value for x in operands)
    found = kept(_attend(how, *operands))
    return found, (*operands, *found)


def _backward(how: _How, saved: tuple, cotangents: tuple[Any, Any]) -> tuple:
    *operands, out, lse = saved
    d_out, d_lse = cotangents
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(out)
    d_lse = None if isinstance(d_lse, SymbolicZero) else d_lse
    if how.kernel:
        from pallas_kernels import sm90_mla_backward

        kernel = sm90_mla_backward.backward
        found = kernel(*operands, how.plain, out, lse, d_out, scale=how.scale, d_lse=d_lse)
    else:
        reference = mla_attention_reference.backward
        found = reference(*operands, out, lse, d_out, d_lse, scale=how.scale)
    return *found, None, None


_attend.defvjp(_forward, _backward, symbolic_zeros=True)


def _intervals(
    b: int, t: int, s: int, causal: bool, segment_ids: jax.Array | None,
    cu_seqlens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of every query the first key that it sees, and the one behind the last: int32 [b, t]."""
    row = jnp.arange(t, dtype=jnp.int32)
    if segment_ids is not None:
        low, high = _runs(segment_ids, row)
    elif cu_seqlens is not None:
        after = jnp.searchsorted(cu_seqlens, row, side="right")
        low, high = cu_seqlens[after - 1], cu_seqlens[jnp.minimum(after, len(cu_seqlens) - 1)]
    else:
        low, high = jnp.int32(0), jnp.int32(s)
    if causal:
        high = jnp.minimum(high, jnp.maximum(row + (s - t + 1), 0))
    low, high = jnp.broadcast_arrays(low, high, jnp.zeros((b, t), jnp.int32))[:2]
    return low, high


def _runs(ids: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[start, end) of the run of equal ids around each."""
    turn = ids[:, 1:] != ids[:, :-1]
    start = jnp.pad(turn, ((0, 0), (1, 0)), constant_values=True)
    end = jnp.pad(turn, ((0, 0), (0, 1)), constant_values=True)
    low = lax.cummax(jnp.where(start, row, 0), axis=1)
    high = lax.cummin(jnp.where(end, row + 1, len(row)), axis=1, reverse=True)
    return low, high


def _takes_kernel(
    backend: Backend, q: jax.Array, k: jax.Array, v: jax.Array, k_rope: jax.Array | None
) -> bool:
    widths, keys = (q.shape[-1], v.shape[-1]), k.shape[-3]
    fits = (
        widths in HOPPER_WIDTHS
        and q.dtype == jnp.bfloat16
        and (k_rope is None or k_rope.shape[-1] == HOPPER_ROPE < q.shape[-1])
        and keys <= HOPPER_KEYS
    )
    kernels = takes_kernels(backend)
    if backend == "mosaic_gpu" and not fits:
        rope = "" if k_rope is None else f" and {k_rope.shape[-1]} of them rotary"
        raise ValueError(
            f"backend is 'mosaic_gpu' for {q.dtype} of widths {widths}{rope} and {keys} keys: its "
            f"kernels take bfloat16, widths {', '.join(map(str, HOPPER_WIDTHS))}, "
            f"{HOPPER_ROPE} of them rotary if any, and at most {HOPPER_KEYS} keys"
        )
    return kernels and fits


def _check(
    q: jax.Array, k: jax.Array, v: jax.Array, k_rope: jax.Array | None, scale: Any,
    segment_ids: jax.Array | None, cu_seqlens: jax.Array | None,
) -> None:  # fmt: skip
    if not isinstance(scale, numbers.Real) or not 0 < float(scale) < math.inf:
        raise ValueError(f"scale is {scale}: expected a positive number, known when tracing")
    if segment_ids is not None and cu_seqlens is not None:
        raise ValueError("segment_ids and cu_seqlens are both given: expected one of them")
    batch = "" if cu_seqlens is not None else "b, "
    rope = 0 if k_rope is None else k_rope.shape[-1]
    checks.array("q", q, f"[{batch}t, h, dq]", *FLOATS)
    checks.array("k", k, f"[{batch}s, h, {'dq - r' if rope else 'dq'}]", q.dtype)
    checks.array("v", v, f"[{batch}s, h, dv]", q.dtype)
    *front, _, h, width = q.shape
    s = k.shape[-3]
    checks.exact("k", k, (*front, s, h, width - rope), q.dtype)
    checks.exact("v", v, (*front, s, h, v.shape[-1]), q.dtype)
    if k_rope is not None:
        checks.exact("k_rope", k_rope, (*front, s, rope), q.dtype)
    if segment_ids is not None:
        _check_sequences(q, s, "segment_ids")
        checks.exact("segment_ids", segment_ids, q.shape[:2], jnp.int32)
        _check_runs(segment_ids)
    if cu_seqlens is not None:
        _check_sequences(q, s, "cu_seqlens")
        _check_bounds(cu_seqlens, q.shape[0])


def _check_sequences(q: jax.Array, s: int, name: str) -> None:
    if s != q.shape[-3]:
        found = f"{q.shape[-3]} queries and {s} keys"
        raise ValueError(f"{name} is given with {found}: expected as many")


def _check_runs(ids: jax.Array) -> None:
    if isinstance(ids, Tracer):
        return
    for number, row in enumerate(np.asarray(ids)):
        heads = row[np.flatnonzero(np.diff(row, prepend=row[:1] - 1))]
        found, times = np.unique(heads, return_counts=True)
        if (times > 1).any():
            raise ValueError(
                f"segment_ids[{number}] has id {found[times > 1][0]} in several places: expected "
                "the tokens of a sequence side by side"
            )


def _check_bounds(bounds: jax.Array, t: int) -> None:
    checks.array("cu_seqlens", bounds, "[n + 1]", jnp.int32)
    if len(bounds) < 2:
        raise ValueError(f"cu_seqlens is of length {len(bounds)}: expected 2 at least")
    if isinstance(bounds, Tracer):
        return
    known = np.asarray(bounds)
    if known[0] != 0 or known[-1] != t or (np.diff(known) < 0).any():
        raise ValueError(
            f"cu_seqlens is {known.tolist()}: expected to go from 0 to t = {t} without falling"
        )
