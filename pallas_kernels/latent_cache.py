"""The paged cache of MLA's latents: its FP8 token format, and the writes into it.

A token is a latent of 512, after its RMSNorm, and the rotary key of 64 that all heads share; they
lie in pages of 64 tokens. A bfloat16 cache is [pages, 64, 576]; an FP8 cache is uint8
[pages, 64, 656], of a token in turn (the "V32" layout of FlashMLA):

* 512 bytes: the latent in e4m3;
* 16 bytes: four float32, little end first, the scale of every 128 latents, a power of two:
  2 ** ceil(log2(max(amax / 448, 1e-4))) with their largest magnitude amax; it is the scale that
  has a least value, not amax as in `quantize_tiles`;
* 128 bytes: the key in bfloat16, not quantised.

The latent read back is e4m3 * scale. No number is above 448 once divided by its scale, so nothing
is clipped. 128 latents that hold a NaN or an infinity become NaN, values and scale.

The token at position p of request b lies in row p % 64 of page `block_table[b, p // 64]`. Entries
of the table that no position asks for may hold anything, and so may the rest of the cache, which
keeps its bytes. Writes under jit are in place where the caller donates the cache, with the kernels
and with jnp alike, and through the carry of a loop too; else XLA copies the cache. Inside
`jax.shard_map` pass it `check_vma=False`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from pallas_kernels import checks, gemm_backend
from pallas_kernels.checks import E4M3
from pallas_kernels.gemm_backend import Backend

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float, Float32, Int32, UInt8

    Cache = BFloat16[Array, "pages 64 576"] | UInt8[Array, "pages 64 656"]

PAGE = 64  # tokens
LATENT, KEY, TILE = 512, 64, 128
TILES, PAIRS = LATENT // TILE, KEY // 2
WIDTH = LATENT + KEY
SCALES_AT = LATENT  # bytes of a token in front of its scales, and of its key
KEY_AT = SCALES_AT + 4 * TILES
BYTES = KEY_AT + 2 * KEY

EXPONENT, INFINITY, NAN = map(np.int32, (0x7F800000, 0x7F800000, 0x7FC00000))
ABOVE_448 = np.int32(0x1FFFFF)  # carries into the exponent of what is above 1.75 * 2**n
EXPONENT_OF_448 = np.int32(8 << 23)
LEAST_SCALE = np.int32((127 - 13) << 23)  # the bits of 2**-13, the power of two above 1e-4
INVERSE = np.int32((2 * 127) << 23)  # bits of a power of two, taken from this, give its inverse


def quantize_latent_cache(
    cache: BFloat16[Array, "pages 64 576"], *, backend: Backend = "auto"
) -> UInt8[Array, "pages 64 656"]:
    """The FP8 form, uint8 [pages, 64, 656], of a bfloat16 cache [pages, 64, 576].

    `backend="auto"` is the kernel on Hopper and jnp elsewhere, with the same bits. Raises
    ValueError on other inputs, TypeError when differentiated.
    """
    _check_cache(cache, jnp.bfloat16)
    (cache,) = _constant(cache)
    if gemm_backend.takes_kernels(backend) and cache.size:
        from pallas_kernels import sm90_latent_cache

        return sm90_latent_cache.quantize(cache)
    return _quantized(cache)


def dequantize_latent_cache(
    cache: UInt8[Array, "pages 64 656"],
) -> BFloat16[Array, "pages 64 576"]:
    """The bfloat16 form of an FP8 cache, uint8 [pages, 64, 656]: [pages, 64, 576].

    Plain jnp, and exact: e4m3 * scale is a bfloat16, or infinite where rounding to e4m3 went up to
    2**128. Raises ValueError on other inputs.
    """
    _check_cache(cache, jnp.uint8)
    values = lax.bitcast_convert_type(cache[..., :SCALES_AT], E4M3).astype(jnp.float32)
    scales = cache[..., SCALES_AT:KEY_AT].reshape(*cache.shape[:-1], TILES, 4)
    scales = lax.bitcast_convert_type(scales, jnp.float32)
    latent = (values * jnp.repeat(scales, TILE, axis=-1)).astype(jnp.bfloat16)
    key = cache[..., KEY_AT:].reshape(*cache.shape[:-1], KEY, 2)
    return jnp.concatenate([latent, lax.bitcast_convert_type(key, jnp.bfloat16)], axis=-1)


def append_latents(
    cache: Cache,
    new: BFloat16[Array, "b t 576"],
    block_table: Int32[Array, "b max_pages"],
    positions: Int32[Array, "b t"],
    *,
    backend: Backend = "auto",
) -> Cache:
    """The cache with `new` at its positions: finished latents, after norm and rotation.

    cache is bfloat16 [pages, 64, 576], or uint8 [pages, 64, 656] and `new` is then quantised; new
    is bfloat16 [b, t, 576]; block_table int32 [b, max_pages] and positions int32 [b, t] are those
    of the module. A position below 0 is not written (padding). No two tokens may have the same
    page and row: which of them stays is undefined. Kernel and reference give the same bits.

    Raises ValueError on dtypes, shapes or a backend that do not fit, and for a position behind the
    end of the table or in a page that the cache does not have; such a token is not written where
    the values are being traced (under jit) and cannot be checked. TypeError when differentiated.
    """
    checks.array("new", new, "[b, t, 576]", jnp.bfloat16)
    _check_write("new", cache, new, block_table, positions)
    cache, new = _constant(cache, new)
    if gemm_backend.takes_kernels(backend) and _something(cache, new, block_table):
        from pallas_kernels import sm90_latent_cache

        return sm90_latent_cache.append(cache, new, block_table, positions)
    return _append(cache, new, block_table, positions)


def write_latents(
    cache: Cache,
    down: BFloat16[Array, "b t 576"],
    norm_weight: Float[Array, "512"],
    turn: Float32[Array, "b t 32 2"],
    block_table: Int32[Array, "b max_pages"],
    positions: Int32[Array, "b t"],
    *,
    eps: float,
    backend: Backend = "auto",
) -> Cache:
    """`append_latents` of what the down projection gave: norm, rotation and write in one pass.

    down is bfloat16 [b, t, 576], the latent in front. The latent becomes
    `x / sqrt(mean(x**2) + eps) * norm_weight` (float32, weight [512] in bfloat16 or float32), the
    key's pairs (x[2i], x[2i + 1]) are turned by the (cos, sin) of `turn`, float32 [b, t, 32, 2];
    both are rounded to bfloat16 before they are quantised or written. Kernel and reference may
    differ by a unit in the last place of that, and then by a step of e4m3. All else, errors too,
    is as in `append_latents`.
    """
    checks.array("down", down, "[b, t, 576]", jnp.bfloat16)
    _check_write("down", cache, down, block_table, positions)
    checks.array("norm_weight", norm_weight, "[512]", jnp.bfloat16, jnp.float32)
    checks.exact("norm_weight", norm_weight, (LATENT,), norm_weight.dtype)
    checks.exact("turn", turn, (*down.shape[:2], PAIRS, 2))
    cache, down, norm_weight, turn = _constant(cache, down, norm_weight, turn)
    if gemm_backend.takes_kernels(backend) and _something(cache, down, block_table):
        from pallas_kernels import sm90_latent_cache

        return sm90_latent_cache.write(
            cache, down, norm_weight, turn, block_table, positions, eps=eps
        )
    return _append(cache, _finished(down, norm_weight, turn, eps), block_table, positions)


def power_of_two_scale(amax: Float32[Array, "*tiles"]) -> tuple[jax.Array, jax.Array]:
    """(scale, 1 / scale) of tiles with those largest magnitudes; NaN where amax is not finite.

    In integers, so that it is exact with any compiler: amax / 448 is at most 2**n where amax is at
    most 1.75 * 2**(n + 8).
    """
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    scale = ((bits + ABOVE_448) & EXPONENT) - EXPONENT_OF_448
    scale = jnp.where(scale < LEAST_SCALE, LEAST_SCALE, scale)
    finite = bits < INFINITY
    inverse = jnp.where(finite, INVERSE - scale, NAN)
    scale = jnp.where(finite, scale, NAN)
    return (
        lax.bitcast_convert_type(scale, jnp.float32),
        lax.bitcast_convert_type(inverse, jnp.float32),
    )


def _quantized(tokens: jax.Array) -> jax.Array:
    """[..., 576] to [..., 656]."""
    shape = tokens.shape[:-1]
    latent = tokens[..., :LATENT].astype(jnp.float32).reshape(*shape, TILES, TILE)
    # Largest of the bits: XLA's maximum of floats loses NaN on the CPU.
    magnitude = lax.bitcast_convert_type(jnp.abs(latent), jnp.int32)
    amax = lax.bitcast_convert_type(jnp.max(magnitude, axis=-1, keepdims=True), jnp.float32)
    scale, inverse = power_of_two_scale(amax)
    values = jnp.where(jnp.isnan(scale), jnp.nan, latent * inverse).astype(E4M3)
    parts = (values, LATENT), (scale, KEY_AT - SCALES_AT), (tokens[..., LATENT:], BYTES - KEY_AT)
    as_bytes = ((lax.bitcast_convert_type(part, jnp.uint8), size) for part, size in parts)
    return jnp.concatenate([part.reshape(*shape, size) for part, size in as_bytes], axis=-1)


def _finished(down: jax.Array, weight: jax.Array, turn: jax.Array, eps: float) -> jax.Array:
    """Norm and rotation, as the model does them apart from the cache."""
    latent, key = jnp.split(down.astype(jnp.float32), [LATENT], axis=-1)
    norm = lax.rsqrt(jnp.mean(latent * latent, axis=-1, keepdims=True) + eps)
    latent = latent * norm * weight.astype(jnp.float32)
    even, odd, cos, sin = key[..., ::2], key[..., 1::2], turn[..., 0], turn[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    whole = jnp.concatenate([latent, turned.reshape(key.shape)], axis=-1)
    # XLA would drop the rounding between norm and quantisation as needless.
    return lax.reduce_precision(whole, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)


def _append(
    cache: jax.Array, new: jax.Array, block_table: jax.Array, positions: jax.Array
) -> jax.Array:
    if not _something(cache, new, block_table):
        return cache
    slot = positions // PAGE
    inside = (slot >= 0) & (slot < block_table.shape[1])
    page = jnp.take_along_axis(block_table, jnp.where(inside, slot, 0), axis=1)
    page = jnp.where(inside & (page >= 0), page, cache.shape[0])  # behind the end, so dropped
    tokens = _quantized(new) if cache.dtype == jnp.uint8 else new
    return jnp.asarray(cache).at[page, positions % PAGE].set(tokens, mode="drop")


def _something(cache: jax.Array, new: jax.Array, block_table: jax.Array) -> bool:
    return bool(cache.size and new.size and block_table.size)


def _check_cache(cache: jax.Array, *dtypes: jax.typing.DTypeLike) -> None:
    checks.array("cache", cache, "[pages, 64, 576 or 656]", *dtypes)
    width = BYTES if cache.dtype == jnp.uint8 else WIDTH
    checks.exact("cache", cache, (cache.shape[0], PAGE, width), cache.dtype)


def _check_write(
    name: str, cache: jax.Array, new: jax.Array, block_table: jax.Array, positions: jax.Array
) -> None:
    _check_cache(cache, jnp.bfloat16, jnp.uint8)
    b, t = new.shape[:2]
    checks.exact(name, new, (b, t, WIDTH), jnp.bfloat16)
    checks.array("block_table", block_table, "[b, max_pages]", jnp.int32)
    checks.exact("block_table", block_table, (b, block_table.shape[1]), jnp.int32)
    checks.exact("positions", positions, (b, t), jnp.int32)
    if not isinstance(positions, Tracer):
        _check_positions(cache.shape[0], block_table, np.asarray(positions))


def _check_positions(pages: int, block_table: jax.Array, positions: np.ndarray) -> None:
    most = block_table.shape[1]
    for b, t in np.argwhere(positions >= most * PAGE)[:1]:
        raise ValueError(
            f"positions[{b}, {t}] is {positions[b, t]}: expected below {most * PAGE}, "
            f"as block_table has {most} pages of {PAGE}"
        )
    if isinstance(block_table, Tracer) or not most:
        return
    slot = np.maximum(positions // PAGE, 0)
    page = np.take_along_axis(np.asarray(block_table), slot, axis=1)
    for b, t in np.argwhere((positions >= 0) & ((page < 0) | (page >= pages)))[:1]:
        raise ValueError(
            f"block_table[{b}, {slot[b, t]}] is {page[b, t]}, where positions[{b}, {t}] = "
            f"{positions[b, t]} lies: expected 0 to {pages - 1}, a page of the cache"
        )


@jax.custom_jvp
def _constant(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays


@_constant.defjvp
def _refuse_gradient(primals: tuple, tangents: tuple) -> NoReturn:
    raise TypeError("the latent cache is not differentiable: it is for inference")
