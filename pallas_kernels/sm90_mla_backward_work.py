"""Units of the backward kernel of MLA's attention: tiles of 128 keys of a head, and the tiles of 64
queries that see them.

The list of units is one in which later tiles of keys of a head stand before earlier ones, and every
SM works through a part of it in that order: so a unit waits only for units that stand before it.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.sm90_mla_schedule import at_most, halves, sm_count, transposed

KEYS, QUERIES = 128, 64  # of a tile
L2_BYTES = 24 << 20  # of operands and sums that heads worked on at a time may have
SETUP = 3.0  # steps that loading keys and storing their gradients costs
Scalar = Any


@dataclasses.dataclass(frozen=True)
class Unit:
    """A tile of keys: queries' tiles `first` to `first` + `count`, those from step `clear` to
    `mixed` without a mask."""

    batch: Scalar
    head: Scalar
    tile: Scalar
    first: Scalar
    count: Scalar
    clear: Scalar
    mixed: Scalar


@dataclasses.dataclass(frozen=True)
class Work:
    """arrays: what the kernel reads: `units` int32 [CTAs, units + 1, words], whose last row holds
    counts, and, unless attention is plain, `last` int32 [b, query tiles], the tile of keys behind
    the last that each sees, and `ends` int32 [b, 2, keys], the queries that see each key.
    seen: bool [b, t], queries whose tile any key sees; None where all are."""

    arrays: dict[str, jax.Array | None]
    ctas: int
    seen: jax.Array | None

    @classmethod
    def of(
        cls, low: jax.Array | None, high: jax.Array | None, b: int, h: int, t: int, s: int,
        plain: bool, sms: int | None,
    ) -> Work:  # fmt: skip
        tiles, sms = s // KEYS, sms or sm_count()
        order = _order(b * h, tiles, t)
        if plain:
            lists = _greedy(order, lambda tile: (t // QUERIES - 2 * tile) + SETUP, sms)
            table = _table(lists)[..., None]
            plain_arrays: dict[str, jax.Array | None] = dict(units=jnp.asarray(table))
            return cls(plain_arrays, len(table), None)
        if low is None or high is None:
            raise ValueError("low and high are missing: only plain attention does without")
        first_tile, last_tile = _touched(low, high)
        lists = _to_and_fro(order, sms)
        words = _words(first_tile, last_tile, low, high, s)
        table = _table(lists)
        tile = table[:, :-1] % tiles
        chosen = words[table[:, :-1] // tiles // h, tile]
        units = jnp.concatenate([table[:, :-1, None], chosen], 2)
        counts = jnp.broadcast_to(table[:, -1:, None], (len(table), 1, 3))
        arrays: dict[str, jax.Array | None] = dict(
            units=jnp.concatenate([units, counts], 1), last=last_tile,
            ends=jnp.stack(transposed(low, high, s), 1),
        )  # fmt: skip
        return cls(arrays, len(table), jnp.repeat(last_tile > first_tile, QUERIES, axis=1))


def _touched(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[first, last) tiles of keys that each tile of queries meets, int32 [b, tiles]; neither ever
    falls, so that a tile of keys is met by a run of tiles of queries."""
    low, high = (x.reshape(x.shape[0], -1, QUERIES) for x in (low, high))
    empty = low >= high
    first = jnp.where(empty, jnp.iinfo(jnp.int32).max // 2, low).min(-1) // KEYS
    last = -(-jnp.where(empty, 0, high).max(-1) // KEYS)
    return lax.cummin(first, axis=1, reverse=True), lax.cummax(last, axis=1)


def _words(
    first_tile: jax.Array, last_tile: jax.Array, low: jax.Array, high: jax.Array, s: int
) -> jax.Array:
    """Of every tile of keys: its queries' first tile and count, and which need no mask."""
    first, end = (at_most(bound, s // KEYS) for bound in (last_tile, first_tile))
    count = jnp.maximum(end - first, 0)
    begin, stop = (x.reshape(x.shape[0], -1, KEYS) for x in transposed(low, high, s))
    clear = jnp.clip(-(-begin.max(-1) // QUERIES) - first, 0, count)
    mixed = jnp.clip(stop.min(-1) // QUERIES - first, clear, count)
    return jnp.stack([first << 16 | count, clear << 16 | mixed], -1)


def _order(heads: int, tiles: int, t: int) -> list[tuple[int, int]]:
    """(head, tile): heads whose operands share L2 together, tile by tile from the last."""
    group = max(1, L2_BYTES // (t * 2048))
    return [
        (head, tile)
        for first in range(0, heads, group)
        for tile in range(tiles - 1, -1, -1)
        for head in range(first, min(first + group, heads))
    ]


def _greedy(order: list[tuple[int, int]], cost: Any, sms: int) -> list[list[int]]:
    """Each unit to whoever is free first."""
    tiles = max(tile for _, tile in order) + 1
    free = [(0.0, cta) for cta in range(min(sms, len(order)))]
    lists: list[list[int]] = [[] for _ in free]
    for head, tile in order:
        time, cta = heapq.heappop(free)
        lists[cta].append(head * tiles + tile)
        heapq.heappush(free, (time + cost(tile), cta))
    return lists


def _to_and_fro(order: list[tuple[int, int]], sms: int) -> list[list[int]]:
    """Costs are not known when tracing: units are dealt in rows, every other one backwards."""
    tiles = max(tile for _, tile in order) + 1
    lists: list[list[int]] = [[] for _ in range(min(sms, len(order)))]
    for i, (head, tile) in enumerate(order):
        row, place = divmod(i, len(lists))
        lists[-1 - place if row % 2 else place].append(head * tiles + tile)
    return lists


def _table(lists: list[list[int]]) -> np.ndarray:
    table = np.zeros((len(lists), max(map(len, lists)) + 1), np.int32)
    for row, units in zip(table, lists, strict=True):
        row[: len(units)] = units
        row[-1] = len(units)
    return table


def unit_of(words: tuple[Scalar, ...], plain: bool, heads: int, tiles: int, queries: int) -> Unit:
    """Of the table's words; `queries` tiles of them in all."""
    number = words[0]
    both, tile = lax.div(number, jnp.int32(tiles)), lax.rem(number, jnp.int32(tiles))
    batch, head = lax.div(both, jnp.int32(heads)), lax.rem(both, jnp.int32(heads))
    if plain:
        count = queries - 2 * tile
        return Unit(batch, head, tile, 2 * tile, count, jnp.int32(2), count)
    (first, count), (clear, mixed) = halves(words[1]), halves(words[2])
    return Unit(batch, head, tile, first, count, clear, mixed)
