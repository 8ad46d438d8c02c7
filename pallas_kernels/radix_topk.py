"""Where the k largest of many numbers are, without sorting them: for k in the thousands.

XLA selects at most 256 on a GPU and sorts the rows for more. Here a few counts find the k-th
largest number digit by digit; bit masks of what is above it then say for every place in the result
which number goes there, in ascending order. Plain jnp, for any device, with nothing of the size of
the numbers in memory but themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32

DIGIT = 4  # bits that one pass over the numbers finds
WORD = 32
POSITIVE = np.uint32(1 << 31)
LEAST = np.uint32(1 << 23)  # where -3.4e38 comes in the order of all float32


def radix_topk(x: Float32[Array, "*rows s"], k: int) -> Int32[Array, "*rows k"]:
    """Indices of the k largest finite numbers of a row, ascending, then -1 if there are fewer.

    Of equal numbers those further in front are taken first; -0 equals 0.
    """
    *rows, s = x.shape
    if not x.size or not k:
        return jnp.full((*rows, k), -1, jnp.int32)
    return _places(_chosen(x.reshape(-1, s), k), k).reshape(*rows, k)


def _chosen(x: jax.Array, k: int) -> jax.Array:
    """Bit i % 32 of word i // 32 says whether number i is among the k largest finite ones.

    A NaN is in no comparison's favour, -inf below all thresholds, and +inf counted apart.
    """
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % WORD)), constant_values=-jnp.inf)
    (infinite,) = _counts([x == jnp.inf])
    threshold = _threshold(x, k + infinite)[:, None]
    above, equal = _words((x > threshold) & (x < jnp.inf)), _words(x == threshold)
    count = _ones(equal)
    missing = k - _ones(above).sum(axis=1, keepdims=True)
    before = jnp.cumsum(count, axis=1) - count
    return above | _lowest(equal, jnp.clip(missing - before, 0, count))


def _threshold(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest number of each row, the least finite one there is for k beyond that."""
    order = jnp.zeros(x.shape[0], jnp.uint32)
    for shift in range(WORD - DIGIT, -1, -DIGIT):
        steps = [order + np.uint32(i << shift) for i in range(1, 1 << DIGIT)]
        counts = _counts([x >= _number(step)[:, None] for step in steps])
        digit = sum((count >= k).astype(jnp.uint32) for count in counts)
        order += digit << shift
    return _number(order)


def _number(order: jax.Array) -> jax.Array:
    """The float32 at a place in the order of all, at least the least finite one."""
    order = jnp.maximum(order, LEAST)
    bits = jnp.where(order >= POSITIVE, order - POSITIVE, ~order)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _counts(masks: list[jax.Array]) -> tuple[jax.Array, ...]:
    """How many are true in each row of each mask, in one pass."""
    zeros = (np.int32(0),) * len(masks)

    def add(one: tuple, other: tuple) -> tuple:
        return tuple(a + b for a, b in zip(one, other, strict=True))

    return lax.reduce(tuple(mask.astype(jnp.int32) for mask in masks), zeros, add, (1,))


def _words(mask: jax.Array) -> jax.Array:
    bits = jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)
    return jnp.where(mask.reshape(mask.shape[0], -1, WORD), bits, 0).sum(axis=2, dtype=jnp.uint32)


def _places(words: jax.Array, k: int) -> jax.Array:
    """Numbers of the first k bits that are set, then -1."""
    rows, width = words.shape
    count, place = _ones(words), jnp.arange(k, dtype=jnp.int32)
    ends = jnp.cumsum(count, axis=1)
    first = width * lax.broadcasted_iota(jnp.int32, (rows, k), 0)

    def of(array: jax.Array, word: jax.Array) -> jax.Array:
        flat = first + jnp.minimum(word, width - 1)
        return array.reshape(-1).at[flat].get(mode="promise_in_bounds")

    word = jnp.zeros((rows, k), jnp.int32)  # how many of the row end at or before the place
    for step in 2 ** np.arange(width.bit_length())[::-1]:
        probe = word + int(step)
        word = jnp.where((probe <= width) & (of(ends, probe - 1) <= place), probe, word)
    before = of(ends, word) - of(count, word)
    found = word * WORD + _nth(of(words, word), place - before)
    return jnp.where(place < ends[:, -1:], found, -1)


def _ones(words: jax.Array) -> jax.Array:
    return lax.population_count(words).astype(jnp.int32)


def _lowest(words: jax.Array, count: jax.Array) -> jax.Array:
    """The words with none but their `count` lowest ones."""
    last = _nth(words, count - 1).astype(jnp.uint32)
    return jnp.where(count > 0, words & (~jnp.uint32(0) >> (WORD - 1 - last)), 0)


def _nth(words: jax.Array, n: jax.Array) -> jax.Array:
    """The place of one number n, from 0 on, in words that have more than n."""
    place = jnp.zeros_like(n)
    for width in (16, 8, 4, 2, 1):
        low = (words >> place.astype(jnp.uint32)) & np.uint32((1 << width) - 1)
        below = _ones(low)
        further = n >= below
        n, place = n - jnp.where(further, below, 0), place + jnp.where(further, width, 0)
    return place
