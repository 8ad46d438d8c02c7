"""The lightning indexer of DeepSeek-V3.2's sparse attention: which keys a query attends to.

Query i gives key j the logit `k_scale[j] * sum_h weights[i, h] * relu(q[i, h] . k[j])`, with few
and narrow heads in FP8, and attends to the keys with the largest (V3.2 report, section 2.1; the
products are DeepGEMM's fp8_mqa_logits and fp8_paged_mqa_logits). `weights` holds everything that
belongs to a query: its quantisation's scale, the head's weight, and 128**-0.5 and h**-0.5. Before
they are quantised, queries and keys are turned by `hadamard`, which spreads outliers.

The products are not differentiable: the indexer is trained on scores in bfloat16.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from pallas_kernels import checks, device, gemm_backend
from pallas_kernels.checks import E4M3
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.index_cache import PAGE, PAGE_BYTES, WIDTH, split_pages
from pallas_kernels.quantize import FLOATS, quantize_tiles
from pallas_kernels.radix_topk import radix_topk

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int32, UInt8

KERNEL_HEADS = (32, 64, 128)
MOST_QUERIES = 4  # a sequence, in decoding
SELECTED_BY_XLA = 16  # for a larger k it sorts the rows on a GPU
MOST_SCORES = 1 << 24  # that the reference holds at a time
EXACT = lax.Precision.HIGHEST


def index_logits(
    q: Float8e4m3fn[Array, "t h 128"],
    k: Float8e4m3fn[Array, "s 128"],
    k_scale: Float32[Array, " s"],
    weights: Float32[Array, "t h"],
    low: Int32[Array, " t"],
    high: Int32[Array, " t"],
    *,
    backend: Backend = "auto",
) -> Float32[Array, "t s"]:
    """Logits of the keys [low[i], high[i]) for each query i of a prompt, -inf elsewhere.

    An interval may be empty or reach beyond [0, s); what lies outside it, NaN too, does not matter.
    The kernel works on tiles of 256 keys that some query of 16 to 64 in a row sees. Raises
    ValueError on dtypes, shapes or a backend that do not fit, and for backend="mosaic_gpu" unless
    h is 32, 64 or 128; TypeError when differentiated.
    """
    checks.array("q", q, "[t, h, 128]", E4M3)
    t, h, s = *_heads(q), k.shape[0]
    checks.array("k", k, "[s, 128]", E4M3)
    checks.exact("k", k, (s, WIDTH), E4M3)
    checks.exact("k_scale", k_scale, (s,))
    checks.exact("weights", weights, (t, h))
    checks.exact("low", low, (t,), jnp.int32)
    checks.exact("high", high, (t,), jnp.int32)
    q, k, k_scale, weights = _constant(q, k, k_scale, weights)
    kernel = _takes_kernel(backend, h)
    if not t * s:
        return jnp.zeros((t, s), jnp.float32)
    if kernel:
        from pallas_kernels import sm90_lightning_indexer

        return sm90_lightning_indexer.logits(q, k, k_scale, weights, low, high)
    return _logits(q, k, k_scale, weights, low, high)


def paged_index_logits(
    q: Float8e4m3fn[Array, "b t h 128"],
    k_cache: UInt8[Array, "pages 8448"],
    weights: Float32[Array, "b t h"],
    block_table: Int32[Array, "b max_pages"],
    lengths: Int32[Array, " b"],
    *,
    backend: Backend = "auto",
) -> Float32[Array, "b t max_keys"]:
    """Logits float32 [b, t, max_pages * 64] of the keys that sequences have in a cache.

    The t queries, 1 to 4, are those of a sequence's last tokens, whose keys are in the cache and in
    `lengths`: query i sees the keys below lengths - (t - 1 - i); the logits of others are -inf.
    k_cache uint8 [pages, 8448] holds values and scales as `index_cache` says; block_table int32
    [b, max_pages] names the pages in turn. Table and pages behind a length may hold anything.

    Raises ValueError on dtypes, shapes or a backend that do not fit, for lengths outside 0 to
    max_pages * 64 unless they are being traced (under jit), and for backend="mosaic_gpu" unless h
    is 32, 64 or 128; TypeError when differentiated.
    """
    checks.array("q", q, "[b, t, h, 128]", E4M3)
    b, t, h = _heads(q)
    if t > MOST_QUERIES:
        raise ValueError(f"t is {t} in q {q.shape}: expected 1 to {MOST_QUERIES}")
    checks.array("k_cache", k_cache, "[pages, 8448]", jnp.uint8)
    checks.exact("k_cache", k_cache, (k_cache.shape[0], PAGE_BYTES), jnp.uint8)
    checks.exact("weights", weights, (b, t, h))
    checks.array("block_table", block_table, "[b, max_pages]", jnp.int32)
    keys = block_table.shape[1] * PAGE
    checks.exact("block_table", block_table, (b, block_table.shape[1]), jnp.int32)
    checks.exact("lengths", lengths, (b,), jnp.int32)
    _check_lengths(lengths, keys)
    q, weights = _constant(q, weights)
    kernel = _takes_kernel(backend, h)
    if not (b * t * keys and k_cache.size):
        return jnp.full((b, t, keys), -jnp.inf, jnp.float32)
    if kernel:
        from pallas_kernels import sm90_lightning_indexer_paged

        return sm90_lightning_indexer_paged.logits(q, k_cache, weights, block_table, lengths)
    return _paged_logits(q, k_cache, weights, block_table, lengths)


def index_topk(logits: Float32[Array, "*rows s"], k: int) -> Int32[Array, "*rows k"]:
    """Where a row's k largest finite logits are, in ascending order, behind them -1 if fewer are
    finite.

    Of equal logits those further in front are taken first. Neighbours in the result are then
    neighbours in the cache, and what reads it may stop at -1. Raises ValueError on other dtypes
    and for k < 0.
    """
    checks.array("logits", logits, "[..., s]", jnp.float32)
    if k < 0:
        raise ValueError(f"k is {k}: expected 0 or more")
    if k > SELECTED_BY_XLA and device.is_gpu():
        return radix_topk(logits, k)
    return _sorted_topk(logits, k)


def quantize_index(
    x: Float[Array, "*rows 128"], *, backend: Backend = "auto"
) -> tuple[Float8e4m3fn[Array, "*rows 128"], Float32[Array, "*rows"]]:
    """e4m3 values and a power-of-two scale for each row of 128: `quantize_tiles`, its errors too.

    x is bfloat16 or float32 [..., 128].
    """
    _check_rows(x)
    q, scale = quantize_tiles(x.reshape(-1, WIDTH), power_of_two=True, backend=backend)
    return q.reshape(x.shape), scale.reshape(x.shape[:-1])


def hadamard(x: Float[Array, "*rows 128"]) -> Float[Array, "*rows 128"]:
    """The orthonormal Walsh-Hadamard transform of rows of 128, in natural order, its own inverse.

    x is bfloat16 or float32 and so is the result; sums are float32. ValueError on other inputs.
    """
    _check_rows(x)
    signs = jnp.asarray(_signs(), x.dtype)
    sums = jnp.matmul(x, signs, precision=EXACT, preferred_element_type=jnp.float32)
    return (sums * np.float32(WIDTH**-0.5)).astype(x.dtype)


@functools.cache
def _signs() -> np.ndarray:
    """(-1) ** (ones that i and j share, in binary)."""
    i = np.arange(WIDTH)
    return 1 - 2.0 * (np.bitwise_count(i[:, None] & i) % 2)


def _sorted_topk(logits: jax.Array, k: int) -> jax.Array:
    s = logits.shape[-1]
    known = jnp.where(logits == 0, 0, logits)  # -0 is not below 0
    values, places = lax.top_k(jnp.where(jnp.isfinite(known), known, -jnp.inf), min(k, s))
    places = jnp.sort(jnp.where(values > -jnp.inf, places, s), axis=-1)
    spare = [(0, 0)] * (logits.ndim - 1) + [(0, k - min(k, s))]
    return jnp.pad(jnp.where(places < s, places, -1), spare, constant_values=-1)


def _logits(
    q: jax.Array, k: jax.Array, k_scale: jax.Array, weights: jax.Array, low: jax.Array,
    high: jax.Array,
) -> jax.Array:  # fmt: skip
    keys, place = k.astype(jnp.float32), jnp.arange(k.shape[0])

    def row(operands: tuple[jax.Array, ...]) -> jax.Array:
        q, weights, low, high = operands
        scores = jnp.einsum("hw,sw->hs", q.astype(jnp.float32), keys, precision=EXACT)
        total = jnp.einsum("h,hs->s", weights, jnp.maximum(scores, 0), precision=EXACT)
        return jnp.where((place >= low) & (place < high), total * k_scale, -jnp.inf)

    together = max(1, MOST_SCORES // (q.shape[1] * k.shape[0]))
    return lax.map(row, (q, weights, low, high), batch_size=together)


def _paged_logits(
    q: jax.Array, k_cache: jax.Array, weights: jax.Array, block_table: jax.Array, lengths: jax.Array
) -> jax.Array:
    t, keys = q.shape[1], block_table.shape[1] * PAGE

    def sequence(operands: tuple[jax.Array, ...]) -> jax.Array:
        q, weights, pages, length = operands
        values, scales = split_pages(jnp.take(k_cache, pages, axis=0, mode="clip"))
        values, scales = values.reshape(keys, WIDTH), scales.reshape(keys)
        high = length - (t - 1 - jnp.arange(t, dtype=jnp.int32))
        return _logits(q, values, scales, weights, jnp.zeros_like(high), high)

    return lax.map(sequence, (q, weights, block_table, lengths))


def _takes_kernel(backend: Backend, heads: int) -> bool:
    gemm_backend.check(backend)
    if backend == "mosaic_gpu" and heads not in KERNEL_HEADS:
        raise ValueError(f"h is {heads}: mosaic_gpu takes {', '.join(map(str, KERNEL_HEADS))}")
    return heads in KERNEL_HEADS and gemm_backend.takes_kernels(backend)


def _heads(q: jax.Array) -> tuple[int, ...]:
    """Its dimensions but for the last, which is 128."""
    checks.exact("q", q, (*q.shape[:-1], WIDTH), E4M3)
    if not q.shape[-2]:
        raise ValueError(f"h is 0 in q {q.shape}: expected 1 or more")
    return q.shape[:-1]


def _check_rows(x: jax.Array) -> None:
    checks.array("x", x, "[..., 128]", *FLOATS)
    checks.exact("x", x, (*x.shape[:-1], WIDTH), x.dtype)


def _check_lengths(lengths: jax.Array, most: int) -> None:
    known = np.asarray([] if isinstance(lengths, Tracer) else lengths)
    for i in np.flatnonzero((known < 0) | (known > most))[:1]:
        raise ValueError(f"lengths[{i}] is {known[i]}: expected 0 to {most}, 64 x max_pages")


@jax.custom_jvp
def _constant(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


@_constant.defjvp
def _refuse_gradient(primals: tuple, tangents: tuple) -> NoReturn:
    raise TypeError("the indexer's logits are not differentiable: train it on bfloat16 scores")
