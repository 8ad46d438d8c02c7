"""Decode, dense and sparse, on a paged cache.

Rows that differ in lengths alone run one compiled program: block tables are as wide as the longest
request of these rows needs, the pool and the calls of a program are the same, and lengths, plan and
tables are arguments. The plan is made outside the timed calls, as a step of many layers would.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.bench.ceilings import Device
from dsjax.bench.mla_check import checked_row
from dsjax.bench.mla_shapes import FP8_CACHE, QK, Case, Kind, Shape, work
from dsjax.bench.paged_cache import (
    block_tables,
    chosen_tokens,
    make_pool,
    page_bytes,
    pool_pages,
    ragged_lengths,
)
from dsjax.bench.rows import OURS, Row
from dsjax.bench.timing import Method, Program, interleaved
from pallas_kernels.checks import ceil_div
from pallas_kernels.latent_cache import PAGE, WIDTH

EQUAL = "equal_lengths"
SCALE = QK**-0.5
CONTEXTS = 16  # tokens of a request's context for each one chosen


class Group(NamedTuple):
    """What rows of one program have in common."""

    fp8: bool
    b: int
    s: int
    h: int


class Sizes(NamedTuple):
    """Of a group: pages of the pool, of a row of the tables, and calls of the program."""

    pool: int
    width: int
    calls: int


class Queries(NamedTuple):
    """What differs from call to call: the queries and where their tokens lie."""

    q: jax.Array
    table: jax.Array


class DecodeRows:
    """Measures rows, and keeps the group's pool and queries, and the programs of all groups."""

    def __init__(self, cases: Sequence[Case], device: Device):
        self._device = device
        self._sizes = sizes_of(cases, device)
        self._programs: dict[Group, Program] = {}
        self._group: Group | None = None
        self._pool, self._queries = jnp.zeros(0), list[jax.Array]()

    def measure(self, kind: Kind, shape: Shape, method: Method) -> Row[Kind, Shape]:
        """Time one row, and requests of equal lengths beside ragged ones; check it."""
        self._hold(group_of(kind, shape))
        lengths = request_lengths(kind, shape)
        programs = {OURS: self._program(kind, shape, lengths)}
        if kind == "ragged":
            equal = request_lengths("decode", shape)
            programs = {EQUAL: self._program(kind, shape, equal), **programs}
        timings = interleaved(programs, method)

        def reference() -> jax.Array:
            shared, (first, *_) = self._arguments(kind, shape, lengths)
            return attend_reference(*shared, first)[0]

        first = programs[OURS].outputs()[0][0]
        return checked_row(Row(kind, shape, timings), first, reference, self._device)

    def _hold(self, group: Group) -> None:
        """Pool and queries of this group, in place of the last one's."""
        if group == self._group:
            return
        self._group, self._pool, self._queries = None, jnp.zeros(0), []
        sizes = self._sizes[group]
        self._pool = make_pool(sizes.pool, fp8=group.fp8)
        self._queries = make_queries(sizes.calls, group.b, group.s, group.h)
        self._group = group

    def _program(self, kind: Kind, shape: Shape, lengths: np.ndarray) -> Program:
        shared, sets = self._arguments(kind, shape, lengths)
        group = group_of(kind, shape)
        if group not in self._programs:
            self._programs[group] = Program(attend, [])
        return self._programs[group].on(sets, shared)

    def _arguments(
        self, kind: Kind, shape: Shape, lengths: np.ndarray
    ) -> tuple[tuple[Any, ...], list[Queries]]:
        sizes = self._sizes[group_of(kind, shape)]
        pages = row_pages(kind, lengths, self._device)
        tables = block_tables(lengths, sizes.width, pages, sizes.calls)
        sets = [
            Queries(q, jnp.asarray(table)) for q, table in zip(self._queries, tables, strict=True)
        ]
        known = jnp.asarray(lengths)
        return (self._pool, known, plan(known, queries=shape.s, heads=shape.h)), sets


def group_of(kind: Kind, shape: Shape) -> Group:
    return Group(kind in FP8_CACHE, shape.b, shape.s, shape.h)


def request_lengths(kind: Kind, shape: Shape) -> np.ndarray:
    if kind == "ragged":
        return ragged_lengths(shape.b, shape.t)
    return np.full(shape.b, shape.t, np.int32)


def row_pages(kind: Kind, lengths: np.ndarray, device: Device) -> int:
    """Pages that a row takes its tables from."""
    used = int(ceil_div(lengths, PAGE).sum())
    return pool_pages(used, page_bytes(fp8=kind in FP8_CACHE), device.rotated)


def sizes_of(cases: Sequence[Case], device: Device) -> dict[Group, Sizes]:
    """As wide as the longest request of the group needs; calls for its shortest row."""
    found: dict[Group, Sizes] = {}
    for kind, shape in cases:
        lengths = request_lengths(kind, shape)
        new = Sizes(
            pool=row_pages(kind, lengths, device),
            width=ceil_div(int(lengths.max()), PAGE),
            calls=device.sets(work(kind, shape)),
        )
        old = found.get(group_of(kind, shape), new)
        found[group_of(kind, shape)] = Sizes(*map(max, old, new))
    return found


def attend(pool: Any, lengths: Any, plan: Any, x: Queries, backend: Any = "auto") -> Any:
    from pallas_kernels.mla_decode import mla_decode

    return mla_decode(x.q, pool, x.table, lengths, scale=SCALE, plan=plan, backend=backend)


attend_reference = jax.jit(functools.partial(attend, backend="reference"))


@functools.partial(jax.jit, static_argnames=("queries", "heads"))
def plan(lengths: jax.Array, *, queries: int, heads: int) -> Any:
    from pallas_kernels.mla_decode import plan_mla_decode

    return plan_mla_decode(lengths, queries=queries, heads=heads)


def make_queries(count: int, b: int, s: int, h: int) -> list[jax.Array]:
    """Not of the pool's key: from equal keys come equal numbers, and a query that is a token of the
    pool sees little else."""
    keys = jax.random.split(jax.random.key(1), count)
    return [jax.random.normal(key, (b, s, h, WIDTH), jnp.bfloat16) for key in keys]


def measure_sparse(kind: Kind, shape: Shape, device: Device, method: Method) -> Row[Kind, Shape]:
    """Time and check sparse decode of tokens chosen from contexts 16 times as long."""
    context = np.full(shape.b, CONTEXTS * shape.k, np.int32)
    pages, calls = row_pages(kind, context, device), device.sets(work(kind, shape))
    pool = make_pool(pages, fp8=True)
    queries = make_queries(calls, shape.b, shape.s, shape.h)
    tables = block_tables(context, ceil_div(int(context[0]), PAGE), pages, calls)
    chosen = [
        chosen_tokens(jax.random.key(i), table, queries=shape.s, count=shape.k)
        for i, table in enumerate(tables)
    ]
    sets = [Queries(q, indices) for q, indices in zip(queries, chosen, strict=True)]
    program = Program(attend_chosen, sets, (pool,))
    timings = interleaved({OURS: program}, method)

    def reference() -> jax.Array:
        return jax.jit(functools.partial(attend_chosen, backend="reference"))(pool, sets[0])[0]

    first = program.outputs()[0][0]
    return checked_row(Row(kind, shape, timings), first, reference, device)


def attend_chosen(pool: Any, x: Queries, backend: Any = "auto") -> Any:
    from pallas_kernels.mla_sparse import mla_sparse_decode

    return mla_sparse_decode(x.q, pool, x.table, scale=SCALE, backend=backend)
