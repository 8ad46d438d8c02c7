"""What decode reads: a pool of cache pages, block tables, lengths, chosen tokens.

All calls of a program read the same pool through different tables. Tables take pages from one
random order of the pool, each going on where the last one ended, so that a page comes back only
when the whole pool has been read: more than fits in L2, and never more than is needed for that.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Num, PRNGKeyArray

from pallas_kernels.checks import ceil_div
from pallas_kernels.latent_cache import BYTES, PAGE, WIDTH, quantize_latent_cache

MOST_BYTES = 10 * 10**9  # of a pool, unless one call needs more
ORIGINALS = 1024  # pages of random numbers; a larger pool repeats them


def pool_pages(used: int, page_bytes: int, rotated: int) -> int:
    """Pages for calls that read `used` of them: two calls' worth and `rotated` bytes, if it fits
    in MOST_BYTES."""
    wanted = max(2 * used, ceil_div(rotated, page_bytes))
    return max(used, min(wanted, MOST_BYTES // page_bytes))


def make_pool(pages: int, *, fp8: bool) -> Num[Array, "pages 64 width"]:
    """At least so many pages of normal latents, bfloat16 or in the FP8 form."""
    originals = min(pages, ORIGINALS)
    return _pool(jax.random.key(0), originals, ceil_div(pages, originals), fp8)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pool(key: PRNGKeyArray, originals: int, times: int, fp8: bool) -> Array:
    pages = jax.random.normal(key, (originals, PAGE, WIDTH), jnp.bfloat16)
    pages = quantize_latent_cache(pages) if fp8 else pages
    return jnp.tile(pages, (times, 1, 1))


def page_bytes(*, fp8: bool) -> int:
    return PAGE * (BYTES if fp8 else 2 * WIDTH)


def block_tables(
    lengths: Int32[np.ndarray, " b"], width: int, pool: int, sets: int
) -> Int32[np.ndarray, "sets b width"]:
    """Tables of random pages of the pool for requests so long; 0 behind them."""
    order = np.random.default_rng(0).permutation(pool).astype(np.int32)
    used = np.arange(width) < ceil_div(lengths, PAGE)[:, None]
    each = int(used.sum())
    tables = np.zeros((sets, *used.shape), np.int32)
    for number in range(sets):
        tables[number, used] = order[(np.arange(each) + number * each) % pool]
    return tables


def ragged_lengths(b: int, mean: int) -> Int32[np.ndarray, " b"]:
    """Normal with half the mean as deviation, clipped to 1 ... 2 mean, rescaled to that mean."""
    drawn = np.random.default_rng(0).normal(mean, mean / 2, b).clip(1, 2 * mean)
    lengths = np.maximum(drawn * (b * mean / drawn.sum()), 1).astype(np.int32)
    missing = b * mean - int(lengths.sum())
    longest = np.argsort(-lengths)[: abs(missing)]
    lengths[longest] += np.sign(missing)
    return lengths


@functools.partial(jax.jit, static_argnames=("queries", "count"))
def chosen_tokens(
    key: PRNGKeyArray, table: Int32[Array, "b pages"], *, queries: int, count: int
) -> Int32[Array, "b queries count"]:
    """Different tokens of its request for every query, as page * 64 + row, in random order."""

    def of(key: PRNGKeyArray, pages: Array) -> Array:
        position = jax.random.permutation(key, pages.shape[0] * PAGE)[:count]
        return pages[position // PAGE] * PAGE + position % PAGE

    def request(key: PRNGKeyArray, pages: Array) -> Array:
        return jax.vmap(of, (0, None))(jax.random.split(key, queries), pages)

    return jax.vmap(request)(jax.random.split(key, table.shape[0]), table)
