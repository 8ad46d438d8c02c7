"""Which tiles of attention an SM works on, and in what order.

A unit is a tile of rows of one head of one batch row, and what it sees of the other side. Rows see
an interval of columns each: queries of keys in the forward kernel, keys of queries where keys are
the rows of a backward kernel. The persistent kernels read their units from a table int32
[CTAs, units of a CTA + 1, words], whose last row holds the CTA's count of units. Heads are taken in
groups whose keys and values share the L2 cache, and within a group the longest units first.

* Plain causal attention: costs are known when tracing, and units go to whoever is free first.
* Intervals: the places are dealt when tracing, so that every CTA gets long and short ones alike;
  which tile has which place follows from the lengths, on the device.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import backend

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

TILE = 128
L2_BYTES = 20 << 20  # of keys and values that heads of one group may have
GOLDEN = 0.6180339887498949  # turns by this part of a circle fall between all those before


class Ranges(NamedTuple):
    """What each tile of rows sees, int32 [b, tiles]: `count` tiles of columns that end before tile
    `last`, walked from the right. Steps from `clear` to `mixed` need no mask; count, clear >= 1."""

    last: jax.Array
    count: jax.Array
    clear: jax.Array
    mixed: jax.Array


def sm_count() -> int:
    return backend.get_default_device().core_count


def ranges(
    low: Int32[Array, "b rows"], high: Int32[Array, "b rows"], rows: int = TILE, cols: int = TILE
) -> Ranges:
    """Of the intervals [low, high), with tiles of so many rows and columns.

    A tile that sees nothing has one step too, all of it masked.
    """
    low, high = (x.reshape(x.shape[0], -1, rows) for x in (low, high))
    empty, most = low >= high, jnp.iinfo(jnp.int32).max
    first = jnp.where(empty, most, low).min(-1) // cols
    last = -(-jnp.where(empty, 0, high).max(-1) // cols)
    first, last = jnp.where(last == 0, 0, first), jnp.maximum(last, 1)
    left = jnp.clip(-(-low.max(-1) // cols), first, last)  # tiles before it are cut at their left
    right = jnp.clip(high.min(-1) // cols, first, last)  # and those from here on at their right
    clear = jnp.maximum(last - right, 1)
    return Ranges(last, last - first, clear, jnp.maximum(last - left, clear))


def transposed(
    low: Int32[Array, "b t"], high: Int32[Array, "b t"], columns: int
) -> tuple[Int32[Array, "b s"], Int32[Array, "b s"]]:
    """[first, end) of the rows that see each column, if neither low nor high ever falls."""
    first, end = at_most(high, columns), at_most(low, columns)
    return first, jnp.maximum(first, end)


def at_most(values: Int32[Array, "b n"], columns: int) -> Int32[Array, "b columns"]:
    """How many values are not above each column."""
    row = jnp.arange(values.shape[0])[:, None]
    counts = jnp.zeros((values.shape[0], columns + 1), jnp.int32)
    counts = counts.at[row, jnp.clip(values, 0, columns)].add(1)
    return jnp.cumsum(counts, axis=1, dtype=jnp.int32)[:, :columns]


def group_of(columns: int, width: int) -> int:
    """Heads whose keys and values of so many bf16 numbers a column share the L2 cache."""
    return max(1, L2_BYTES // (2 * columns * width))


def static_table(
    heads: int, tiles: int, group: int, cost: Callable[[int], float], sms: int
) -> np.ndarray:
    """Of units head * tiles + tile, one word each; `cost` is that of a tile."""
    ranked = sorted(range(tiles), key=cost, reverse=True)
    units = [(head * tiles + tile, cost(tile)) for head, tile in _order(heads, ranked, group)]
    free = [(0.0, cta) for cta in range(min(sms, len(units)))]
    lists: list[list[int]] = [[] for _ in free]
    for unit, length in units:
        time, cta = heapq.heappop(free)
        lists[cta].append(unit)
        heapq.heappush(free, (time + length, cta))
    return _with_counts(_filled(lists))[..., None]


def device_table(seen: Ranges, heads: int, sms: int) -> Int32[Array, "ctas units words"]:
    """Of units (head * tiles + tile, Ranges as two words of `halves`); `heads` a batch row."""
    b, tiles = seen.count.shape
    ranked = jnp.argsort(seen.count, axis=1, descending=True)
    pairs = seen.last << 16 | seen.count, seen.clear << 16 | seen.mixed
    ordered = (jnp.take_along_axis(x, ranked, 1) for x in pairs)
    words = jnp.stack([ranked.astype(jnp.int32), *ordered], -1)
    places = dealt(b * heads, tiles, sms)
    head, rank = np.divmod(np.maximum(places, 0), tiles)
    chosen = words[head // heads, rank]
    chosen = chosen.at[..., 0].add(head * tiles)
    counts = jnp.broadcast_to(_counts(places)[..., None], (len(places), 1, chosen.shape[-1]))
    return jnp.concatenate([chosen, counts], 1)


def halves(word: Any) -> tuple[Any, Any]:
    """Of a word of the table: less than 2**15 and less than 2**16."""
    return word >> 16, word & 0xFFFF


def dealt(heads: int, tiles: int, sms: int) -> np.ndarray:
    """Places head * tiles + rank for every CTA, -1 for none: [CTAs, places of a CTA].

    A group is dealt in rows to and fro, which evens out lengths that fall from rank to rank; what
    is left is the same for every group, so each starts at another CTA.
    """
    ctas = min(sms, heads * tiles)
    lists: list[list[int]] = [[] for _ in range(ctas)]
    group = max(1, 2 * ctas // tiles)
    for number, first in enumerate(range(0, heads, group)):
        members = min(group, heads - first)
        start = int(number * GOLDEN * ctas)
        for i, (head, rank) in enumerate(_order(members, range(tiles), members)):
            row, place = divmod(i, ctas)
            place = ctas - 1 - place if row % 2 else place
            lists[(start + place) % ctas].append((first + head) * tiles + rank)
    return _filled(lists)


def _order(heads: int, ranked: Iterable[int], group: int) -> Iterable[tuple[int, int]]:
    """(head, tile): group by group, and within a group tile by tile."""
    ranked = list(ranked)
    for first in range(0, heads, group):
        for tile in ranked:
            for head in range(first, min(first + group, heads)):
                yield head, tile


def _filled(lists: list[list[int]]) -> np.ndarray:
    table = np.full((len(lists), max(map(len, lists))), -1, np.int32)
    for row, units in zip(table, lists, strict=True):
        row[: len(units)] = units
    return table


def _counts(places: np.ndarray) -> np.ndarray:
    return (places >= 0).sum(1, keepdims=True, dtype=np.int32)


def _with_counts(places: np.ndarray) -> np.ndarray:
    return np.concatenate([places, _counts(places)], 1)
