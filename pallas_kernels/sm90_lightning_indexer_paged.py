"""The lightning indexer's logits of tokens that are being decoded, from a paged cache, on Hopper.

The pages that hold keys, sequence by sequence, are cut into equal shares, one a CTA. Each page goes
to the warpgroup whose turn it is, while the queries of its sequence stay in shared memory. Pages
behind a sequence's end are never fetched: their logits are filled in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels.checks import ceil_div
from pallas_kernels.index_cache import PAGE, PAGE_BYTES
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
from pallas_kernels.sm90_tile import may_overwrite

PAGE_ROWS = PAGE_BYTES // WIDTH  # of 128 bytes, the first 64 of them values
PAGE_FLOATS = PAGE_BYTES // 4  # the last 64 of them scales
SEQUENCES = 2  # whose queries are in shared memory
FILLED = 16  # pages at a time


@dataclasses.dataclass(frozen=True)
class Cut:
    """`stages` hold a page each, a multiple of `warpgroups`: each stage belongs to one of them."""

    warpgroups: int = 3
    stages: int = 12


def cut_for(columns: int) -> Cut:
    """Wide queries leave room for fewer pages."""
    return Cut(stages=6 if columns > 256 else 12)


class Share(NamedTuple):
    """A CTA's: from a page of its first sequence to a page of its last one."""

    first: Scalar
    first_page: Scalar
    last: Scalar
    last_page: Scalar


@functools.partial(jax.jit, static_argnames=("cut", "sms", "interpret"))
def logits(
    q: jax.Array, k_cache: jax.Array, weights: jax.Array, block_table: jax.Array,
    lengths: jax.Array, *, cut: Cut | None = None, sms: int | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`paged_index_logits` for h of 32, 64 or 128.

    The cache goes in twice, as e4m3 and as float32: under `jit` XLA makes no copies for that.
    """
    (b, t, h, _), pages = q.shape, block_table.shape[1]
    cut, sms = cut or cut_for(t * h), sms or backend.get_default_device().core_count
    views = ((E4M3, (PAGE_ROWS, WIDTH)), (jnp.float32, (PAGE_FLOATS, 4)))
    values, scales = (
        lax.bitcast_convert_type(k_cache.reshape(-1, *shape), dtype) for dtype, shape in views
    )
    operands = dict(
        q=q.reshape(b, t * h, WIDTH), values=values, scales=scales,
        weights=weights.reshape(b, t * h), table=block_table,
        lengths=jnp.clip(lengths, 0, pages * PAGE),
    )  # fmt: skip
    return launch(
        _Indexer(cut, b, t, h, pages), "paged_index_logits", operands,
        jax.ShapeDtypeStruct((b, t, pages * PAGE), jnp.float32), cut.warpgroups, sms, interpret,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Indexer:
    """The kernel's static side; its methods are traced inside it."""

    cut: Cut
    sequences: int
    queries: int
    heads: int
    pages: int

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first, count) of each product's queries."""
        most = COLUMNS // self.heads
        return [(i, min(most, self.queries - i)) for i in range(0, self.queries, most)]

    def used(self, refs: Refs, sequence: Scalar) -> Scalar:
        """Pages of a sequence."""
        return lax.div(refs.lengths[sequence] + PAGE - 1, jnp.int32(PAGE))

    def share(self, refs: Refs) -> Share:
        """No sequence, the last before the first, where there is no page for this CTA."""
        cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")

        def add(sequence: Scalar, total: Scalar) -> Scalar:
            return total + self.used(refs, sequence)

        total = lax.fori_loop(0, self.sequences, add, jnp.int32(0))
        each, more = lax.div(total, jnp.int32(ctas)), lax.rem(total, jnp.int32(ctas))
        begin = each * cta + lax.min(cta, more)
        end = begin + each + jnp.where(cta < more, 1, 0) - 1

        def look(sequence: Scalar, state: Any) -> Any:
            before, share = state
            after = before + self.used(refs, sequence)
            first, last = ((before <= at) & (at < after) for at in (begin, end))
            found = Share(
                lax.select(first, sequence, share.first),
                lax.select(first, begin - before, share.first_page),
                lax.select(last, sequence, share.last),
                lax.select(last, end - before, share.last_page),
            )
            return after, found

        unset = Share(jnp.int32(0), jnp.int32(0), jnp.int32(-1), jnp.int32(-1))
        share = lax.fori_loop(0, self.sequences, look, (jnp.int32(0), unset))[1]
        return share._replace(last=lax.select(end < begin, jnp.int32(-1), share.last))

    def walk(
        self, refs: Refs, visit: Callable[[Scalar, Scalar, Scalar, Scalar, Scalar], None]
    ) -> tuple[Scalar, Scalar]:
        """visit(sequence, first page, end, sequences before, pages before) for this CTA's share;
        gives their numbers."""
        share = self.share(refs)

        def some(sequence: Scalar, done: Any) -> Any:
            sequences, pages = done
            first = lax.select(sequence == share.first, share.first_page, jnp.int32(0))
            end = self.used(refs, sequence)
            end = lax.select(sequence == share.last, share.last_page + 1, end)
            visit(sequence, first, end, sequences, pages)
            return sequences + 1, pages + end - first

        return lax.fori_loop(share.first, share.last + 1, some, (jnp.int32(0), jnp.int32(0)))

    def fetch(self, refs: Refs) -> None:
        stages = self.cut.stages

        def visit(
            sequence: Scalar, first: Scalar, end: Scalar, sequences: Scalar, pages: Scalar
        ) -> None:
            self.fetch_queries(refs, sequence, sequences)

            @pl.loop(0, end - first)
            def _(i: Scalar) -> None:
                slot = lax.rem(pages + i, jnp.int32(stages))

                @pl.when(pages + i >= stages)
                def _() -> None:
                    plgpu.barrier_wait(refs.empty.at[slot])
                    may_overwrite(refs)

                self.fetch_page(refs, refs.table[sequence, first + i], slot)

        sequences, pages = self.walk(refs, visit)
        drain(refs.empty, stages, pages)
        drain(refs.q_empty, SEQUENCES, sequences)

    def fetch_queries(self, refs: Refs, sequence: Scalar, sequences: Scalar) -> None:
        slot = lax.rem(sequences, jnp.int32(SEQUENCES))

        @pl.when(sequences >= SEQUENCES)
        def _() -> None:
            plgpu.barrier_wait(refs.q_empty.at[slot])
            may_overwrite(refs)

        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.q_full.at[slot])
        for first, count in self.parts:
            at = pl.ds(first * self.heads, count * self.heads)
            copy(refs.q.at[sequence, at], refs.q_smem.at[slot, at])
            copy(refs.weights.at[sequence, at], refs.weights_smem.at[slot, at])

    def fetch_page(self, refs: Refs, page: Scalar, slot: Scalar) -> None:
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs.full.at[slot])
        copy(refs.values.at[page, pl.ds(0, PAGE)], refs.k_smem.at[slot])
        copy(refs.scales.at[page, pl.ds(PAGE_FLOATS - PAGE, PAGE)], refs.k_scale_smem.at[slot])

    def multiply(self, refs: Refs, wg: Scalar) -> None:
        stages, warpgroups = self.cut.stages, self.cut.warpgroups

        def visit(
            sequence: Scalar, first: Scalar, end: Scalar, sequences: Scalar, pages: Scalar
        ) -> None:
            q_slot = lax.rem(sequences, jnp.int32(SEQUENCES))
            plgpu.barrier_wait(refs.q_full.at[q_slot])
            turn = lax.rem(wg + stages - lax.rem(pages, jnp.int32(stages)), jnp.int32(warpgroups))

            @pl.loop(turn, end - first, step=warpgroups)
            def _(i: Scalar) -> None:
                slot = lax.rem(pages + i, jnp.int32(stages))
                self.page(refs, sequence, q_slot, first + i, slot)

            plgpu.barrier_arrive(refs.q_empty.at[q_slot])

        self.walk(refs, visit)
        self.fill(refs, wg)

    def page(
        self, refs: Refs, sequence: Scalar, q_slot: Scalar, page: Scalar, slot: Scalar
    ) -> None:
        """The logits of a page."""
        length = refs.lengths[sequence]
        plgpu.barrier_wait(refs.full.at[slot])
        scales = plgpu.load(refs.k_scale_smem.at[slot], layout=PER_KEY)
        for first, count in self.parts:
            at, columns = first * self.heads, count * self.heads
            flying = product(refs, (refs.k_smem, slot, 0), (refs.q_smem, q_slot, at, columns))
            own = refs.weights_smem.at[q_slot, pl.ds(at, columns)]
            weights = plgpu.load(own, layout=PER_COLUMN)
            acc = finished(refs, flying)
            if first + count == self.queries:
                plgpu.barrier_arrive(refs.empty.at[slot])
            for i, total in enumerate(over_heads(acc, weights, self.heads), first):
                seen = numbered(page * PAGE) < length - (self.queries - 1 - i)
                logits = jnp.where(seen, total * scales, -jnp.inf)
                write(refs.out.at[sequence, i, pl.ds(page * PAGE, PAGE)], logits)

    def fill(self, refs: Refs, wg: Scalar) -> None:
        """-inf behind the sequences' pages."""
        runs, warpgroups = ceil_div(self.pages, FILLED), self.cut.warpgroups
        cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")

        @pl.loop(cta * warpgroups + wg, self.sequences * runs, step=ctas * warpgroups)
        def _(run: Scalar) -> None:
            sequence = lax.div(run, jnp.int32(runs))
            first = lax.rem(run, jnp.int32(runs)) * FILLED
            end = lax.min(first + FILLED, self.pages)

            @pl.loop(lax.max(first, self.used(refs, sequence)), end)
            def _(page: Scalar) -> None:
                for i in range(self.queries):
                    write(refs.out.at[sequence, i, pl.ds(page * PAGE, PAGE)], nothing())

    def scratch(self) -> dict[str, Any]:
        stages, columns = self.cut.stages, self.queries * self.heads
        return dict(
            q_smem=rows_smem((SEQUENCES, columns, WIDTH), E4M3),
            k_smem=rows_smem((stages, PAGE, WIDTH), E4M3),
            weights_smem=plgpu.SMEM((SEQUENCES, columns), jnp.float32),
            k_scale_smem=plgpu.SMEM((stages, PAGE), jnp.float32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
            q_full=plgpu.Barrier(num_arrivals=2 * len(self.parts), num_barriers=SEQUENCES),
            q_empty=plgpu.Barrier(num_arrivals=self.cut.warpgroups, num_barriers=SEQUENCES),
        )
