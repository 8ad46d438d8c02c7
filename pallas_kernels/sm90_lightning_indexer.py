"""The lightning indexer's logits of a prompt on Hopper.

A CTA keeps a tile of keys in shared memory while the queries of a block stream past it. It walks
such units: first those that some query of the block sees, shared out evenly, then the others, whose
logits it only fills in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels.checks import ceil_div
from pallas_kernels.sm90_index_product import (
    COLUMNS,
    E4M3,
    PER_COLUMN,
    PER_KEY,
    WIDTH,
    Scalar,
    drain,
    finished,
    launch,
    nothing,
    numbered,
    over_heads,
    product,
    rows_smem,
    write,
)
from pallas_kernels.sm90_launch import Refs
from pallas_kernels.sm90_tile import ROWS, may_overwrite

KEY_TILES = 2  # in shared memory
MOST_QUERIES, LEAST_QUERIES = 64, 16  # of a block
UNITS = 8  # a CTA, wished for
NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Cut:
    """Each of `warpgroups` has `down` products of 64 keys; `stages` of shared memory hold a
    product's queries each. A block has `queries` of them."""

    warpgroups: int = 2
    down: int = 2
    stages: int = 6
    queries: int = MOST_QUERIES

    @property
    def rows(self) -> int:
        """Keys of a warpgroup."""
        return self.down * ROWS

    @property
    def keys(self) -> int:
        return self.warpgroups * self.rows


def cut_for(t: int, s: int, sms: int) -> Cut:
    """Large blocks of queries load keys seldom, small ones share the work evenly."""
    cut, queries = Cut(), MOST_QUERIES
    tiles = ceil_div(s, cut.keys)
    while queries > LEAST_QUERIES and ceil_div(t, queries) * tiles < UNITS * sms:
        queries //= 2
    return dataclasses.replace(cut, queries=queries)


def logits(
    q: jax.Array, k: jax.Array, k_scale: jax.Array, weights: jax.Array, low: jax.Array,
    high: jax.Array, *, cut: Cut | None = None, sms: int | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`index_logits` for h of 32, 64 or 128; s that is not divisible by 64 costs a copy."""
    (asked, h, _), s = q.shape, k.shape[0]
    sms = sms or backend.get_default_device().core_count
    cut = cut or cut_for(asked, s, sms)
    t, padded = max(asked, COLUMNS // h), ceil_div(s, ROWS) * ROWS  # a product's queries at least
    q, weights, low, high = (
        jnp.pad(x, ((0, t - asked), *[(0, 0)] * (x.ndim - 1))) for x in (q, weights, low, high)
    )
    low, high = jnp.maximum(low, 0), jnp.minimum(high, s)
    first, last = _tiles_seen(low, high, cut)
    operands = dict(
        q=q.reshape(t * h, WIDTH), k=k, k_scale=k_scale, weights=weights.reshape(t * h),
        low=low, high=high, first=first, last=last,
    )  # fmt: skip
    out = launch(
        _Indexer(cut, h, t, padded), "index_logits", operands,
        jax.ShapeDtypeStruct((t, padded), jnp.float32), cut.warpgroups, sms, interpret,
    )  # fmt: skip
    return out[:asked, :s]


def _tiles_seen(low: jax.Array, high: jax.Array, cut: Cut) -> tuple[jax.Array, jax.Array]:
    """Of each block of queries: tiles [first, last) hold all the keys it sees."""
    blind, spare = low >= high, (0, -low.shape[0] % cut.queries)
    lows = jnp.pad(jnp.where(blind, NEVER, low), spare, constant_values=NEVER)
    highs = jnp.pad(jnp.where(blind, 0, high), spare)
    first = lows.reshape(-1, cut.queries).min(1) // cut.keys
    last = ceil_div(highs.reshape(-1, cut.queries).max(1), cut.keys)
    return jnp.minimum(first, last), last


@dataclasses.dataclass(frozen=True)
class _Indexer:
    """The kernel's static side; its methods are traced inside it."""

    cut: Cut
    heads: int
    queries: int
    keys: int

    @property
    def abreast(self) -> int:
        """Queries of one product."""
        return COLUMNS // self.heads

    def walk(
        self, refs: Refs, seen: bool, visit: Callable[[Scalar, Scalar, Any], Any], carry: Any = ()
    ) -> Any:
        """carry = visit(block of queries, tile of keys, carry) for this CTA's share of the units
        that are seen, or else of the others."""
        cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
        blocks, tiles = ceil_div(self.queries, self.cut.queries), ceil_div(self.keys, self.cut.keys)

        def of_block(block: Scalar, state: Any) -> Any:
            unit, before, carry = state
            first, last = refs.first[block], refs.last[block]
            after = before + (last - first if seen else tiles - (last - first))
            count = lax.max(0, lax.div(after - unit + ctas - 1, jnp.int32(ctas)))

            def some(i: Scalar, carry: Any) -> Any:
                at = unit + i * ctas - before
                tile = first + at if seen else lax.select(at < first, at, at + last - first)
                return visit(block, tile, carry)

            return unit + count * ctas, after, lax.fori_loop(0, count, some, carry)

        return lax.fori_loop(0, blocks, of_block, (cta, jnp.int32(0), carry))[2]

    def products(self, block: Scalar) -> Scalar:
        """Along the queries of a block."""
        queries = lax.min(jnp.int32(self.cut.queries), self.queries - block * self.cut.queries)
        return lax.div(queries + self.abreast - 1, jnp.int32(self.abreast))

    def fetch(self, refs: Refs) -> None:
        cut = self.cut

        def unit(block: Scalar, tile: Scalar, done: Any) -> Any:
            units, steps = done
            self.fetch_keys(refs, tile, units)
            first = block * (cut.queries * self.heads)

            def some(i: Scalar, slot: Scalar) -> Scalar:
                _claim(refs, refs.empty.at[slot], steps + i >= cut.stages)
                at, full = pl.ds(first + i * COLUMNS, COLUMNS), refs.full.at[slot]
                plgpu.copy_gmem_to_smem(refs.q.at[at], refs.q_smem.at[slot], full)
                plgpu.copy_gmem_to_smem(refs.weights.at[at], refs.weights_smem.at[slot], full)
                return _next(slot, cut.stages)

            count = self.products(block)
            lax.fori_loop(0, count, some, lax.rem(steps, jnp.int32(cut.stages)))
            return units + 1, steps + count

        units, steps = self.walk(refs, True, unit, (jnp.int32(0), jnp.int32(0)))
        drain(refs.empty, cut.stages, steps)
        drain(refs.k_empty, KEY_TILES, units)

    def fetch_keys(self, refs: Refs, tile: Scalar, units: Scalar) -> None:
        slot = lax.rem(units, jnp.int32(KEY_TILES))
        _claim(refs, refs.k_empty.at[slot], units >= KEY_TILES)
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.k_full.at[slot])
        for row in range(0, self.cut.keys, self.cut.rows):  # TMA fetches 256 at a time at most
            keys, rows = (pl.ds(i + row, self.cut.rows) for i in (tile * self.cut.keys, 0))
            copy(refs.k.at[keys], refs.k_smem.at[slot, rows])
            copy(refs.k_scale.at[keys], refs.k_scale_smem.at[slot, rows])

    def multiply(self, refs: Refs, wg: Scalar) -> None:
        cut, row = self.cut, wg * self.cut.rows

        def unit(block: Scalar, tile: Scalar, done: Any) -> Any:
            units, steps = done
            k_slot = lax.rem(units, jnp.int32(KEY_TILES))
            plgpu.barrier_wait(refs.k_full.at[k_slot])
            rows = [pl.ds(row + d * ROWS, ROWS) for d in range(cut.down)]
            scales = [plgpu.load(refs.k_scale_smem.at[k_slot, r], layout=PER_KEY) for r in rows]

            def some(i: Scalar, slot: Scalar) -> Scalar:
                query = block * cut.queries + i * self.abreast
                self.step(refs, k_slot, slot, row, tile * cut.keys + row, query, scales)
                return _next(slot, cut.stages)

            count = self.products(block)
            lax.fori_loop(0, count, some, lax.rem(steps, jnp.int32(cut.stages)))
            plgpu.barrier_arrive(refs.k_empty.at[k_slot])
            return units + 1, steps + count

        self.walk(refs, True, unit, (jnp.int32(0), jnp.int32(0)))
        self.walk(refs, False, lambda block, tile, _: self.fill(refs, row, block, tile))

    def step(
        self, refs: Refs, k_slot: Scalar, slot: Scalar, row: Scalar, key: Scalar, query: Scalar,
        scales: list[jax.Array],
    ) -> None:  # fmt: skip
        """Logits of the warpgroup's keys, from number `key` on, for one product's queries."""
        down, columns = self.cut.down, (refs.q_smem, slot, 0, COLUMNS)
        queries = [query + i for i in range(self.abreast)]
        known = [lax.min(i, jnp.int32(self.queries - 1)) for i in queries]
        bounds = [(refs.low[i], refs.high[i]) for i in known]
        plgpu.barrier_wait(refs.full.at[slot])
        flying = [
            product(refs, (refs.k_smem, k_slot, row + d * ROWS), columns) for d in range(down)
        ]
        weights = plgpu.load(refs.weights_smem.at[slot], layout=PER_COLUMN)
        for d in range(down):
            acc = finished(refs, flying[d], down - 1 - d)
            if d == down - 1:
                plgpu.barrier_arrive(refs.empty.at[slot])
            sums, own = over_heads(acc, weights, self.heads), key + d * ROWS
            for number, (low, high), total in zip(queries, bounds, sums, strict=True):
                keys = numbered(own)
                seen = jnp.where((keys >= low) & (keys < high), total * scales[d], -jnp.inf)
                keep = functools.partial(write, refs.out.at[number, pl.ds(own, ROWS)], seen)
                pl.when((number < self.queries) & (own < self.keys))(keep)

    def fill(self, refs: Refs, row: Scalar, block: Scalar, tile: Scalar) -> tuple[()]:
        """-inf where none of the block's queries sees the warpgroup's keys."""
        first = block * self.cut.queries
        last = lax.min(first + self.cut.queries, self.queries)
        for d in range(self.cut.down):
            key = tile * self.cut.keys + row + d * ROWS

            def some(query: Scalar, carry: tuple[()], key: Scalar = key) -> tuple[()]:
                write(refs.out.at[query, pl.ds(key, ROWS)], nothing())
                return carry

            lax.fori_loop(first, lax.select(key < self.keys, last, first), some, ())
        return ()

    def scratch(self) -> dict[str, Any]:
        cut = self.cut
        return dict(
            q_smem=rows_smem((cut.stages, COLUMNS, WIDTH), E4M3),
            k_smem=rows_smem((KEY_TILES, cut.keys, WIDTH), E4M3),
            weights_smem=plgpu.SMEM((cut.stages, COLUMNS), jnp.float32),
            k_scale_smem=plgpu.SMEM((KEY_TILES, cut.keys), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
            empty=plgpu.Barrier(num_arrivals=cut.warpgroups, num_barriers=cut.stages),
            k_full=plgpu.Barrier(num_arrivals=2 * cut.warpgroups, num_barriers=KEY_TILES),
            k_empty=plgpu.Barrier(num_arrivals=cut.warpgroups, num_barriers=KEY_TILES),
        )


def _claim(refs: Refs, empty: Any, used: Scalar) -> None:
    """Wait until what was in a slot, if it is `used`, may be overwritten."""

    @pl.when(used)
    def _() -> None:
        plgpu.barrier_wait(empty)
        may_overwrite(refs)


def _next(slot: Scalar, slots: int) -> Scalar:
    return lax.select(slot + 1 == slots, 0, slot + 1)
