"""The paged cache of the lightning indexer's keys (DeepSeek-V3.2): its format, and writes into it.

A token has 128 e4m3 values and a float32 scale that multiplies them. They lie in pages of 64
tokens, uint8 [pages, 8448], a page's parts behind one another as in DeepGEMM's cache:

* 64 x 128 bytes: the values, row by row;
* 64 x 4 bytes: the scales, little end first.

The token at position p of request b lies in row p % 64 of page `block_table[b, p // 64]`. Entries
of the table behind a request's last token may hold anything, and so may the rest of the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks
from pallas_kernels.checks import E4M3

if TYPE_CHECKING:
    from jaxtyping import Array, Float8e4m3fn, Float32, Int32, UInt8

PAGE, WIDTH = 64, 128
SCALES_AT = PAGE * WIDTH  # bytes of a page in front of its scales
PAGE_BYTES = SCALES_AT + 4 * PAGE


def join_pages(
    values: Float8e4m3fn[Array, "*pages 64 128"], scales: Float32[Array, "*pages 64"]
) -> UInt8[Array, "*pages 8448"]:
    """Bytes [..., 8448] of pages of values and their scales; ValueError on other shapes."""
    pages = values.shape[:-2]
    checks.exact("values", values, (*pages, PAGE, WIDTH), E4M3)
    checks.exact("scales", scales, (*pages, PAGE))
    parts = (lax.bitcast_convert_type(part, jnp.uint8) for part in (values, scales))
    return jnp.concatenate([part.reshape(*pages, -1) for part in parts], axis=-1)


def split_pages(
    cache: UInt8[Array, "*pages 8448"],
) -> tuple[Float8e4m3fn[Array, "*pages 64 128"], Float32[Array, "*pages 64"]]:
    """The values [..., 64, 128] and scales [..., 64] in bytes of pages."""
    pages = cache.shape[:-1]
    checks.exact("cache", cache, (*pages, PAGE_BYTES), jnp.uint8)
    values = cache[..., :SCALES_AT].reshape(*pages, PAGE, WIDTH)
    scales = cache[..., SCALES_AT:].reshape(*pages, PAGE, 4)
    return lax.bitcast_convert_type(values, E4M3), lax.bitcast_convert_type(scales, jnp.float32)


def append_index_keys(
    cache: UInt8[Array, "pages 8448"],
    k: Float8e4m3fn[Array, "b t 128"],
    k_scale: Float32[Array, "b t"],
    block_table: Int32[Array, "b max_pages"],
    positions: Int32[Array, "b t"],
) -> UInt8[Array, "pages 8448"]:
    """The cache with tokens' keys, as `quantize_index` gives them, at their positions.

    A token is not written whose position is below 0 (padding) or behind the end of the table, or
    whose page the cache does not have. Of two tokens in one place it is undefined which stays.
    Under jit the write is in place where the caller donates the cache. Raises ValueError on dtypes
    or shapes that do not fit.
    """
    checks.array("k", k, "[b, t, 128]", E4M3)
    b, t = k.shape[:2]
    checks.exact("k", k, (b, t, WIDTH), E4M3)
    checks.exact("k_scale", k_scale, (b, t))
    checks.array("cache", cache, "[pages, 8448]", jnp.uint8)
    checks.exact("cache", cache, (cache.shape[0], PAGE_BYTES), jnp.uint8)
    checks.array("block_table", block_table, "[b, max_pages]", jnp.int32)
    checks.exact("block_table", block_table, (b, block_table.shape[1]), jnp.int32)
    checks.exact("positions", positions, (b, t), jnp.int32)
    if not (cache.size and k.size and block_table.size):
        return cache
    slot, row = positions // PAGE, positions % PAGE
    inside = (slot >= 0) & (slot < block_table.shape[1])
    page = jnp.take_along_axis(block_table, jnp.where(inside, slot, 0), axis=1)
    page = jnp.where(inside & (page >= 0), page, cache.shape[0])[..., None]  # then it is dropped
    at = row[..., None]
    for part, start in ((k, at * WIDTH), (k_scale, SCALES_AT + 4 * at)):
        bytes_ = lax.bitcast_convert_type(part, jnp.uint8).reshape(b, t, -1)
        cache = cache.at[page, start + jnp.arange(bytes_.shape[-1])].set(bytes_, mode="drop")
    return cache
