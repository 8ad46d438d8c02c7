"""Results of experts back to their tokens on Hopper: sums on the experts' rank, then over NVLink.

`reduce_rows` adds up the rows that a token has on this rank; `combine` fetches these sums from the
ranks that have one and adds them up in the order of ranks, so that repeated runs give the same
bits. Both are the same walk: one warp fetches the rows that there are, and no others, with bulk
copies into a ring of shared memory, as far ahead as it holds; a warpgroup adds them up in float32
registers and rounds once. Rows that are not there cost no traffic and may hold anything.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels.in_place import unfused
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import ALONE, Ranks

THREADS, VECTOR = 128, 8  # the latter: bfloat16 in 16 bytes
MOST_COLUMNS = 8192  # 64 sums a thread
MOST_STAGES = 32  # barriers that an array of them holds
CTAS = 32
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
Scalar = Any


class Ring(NamedTuple):
    """Shared memory of a CTA's rows in bytes, and how many rows at most."""

    bytes: int = 208 << 10
    stages: int = MOST_STAGES

    def fitting(self, row: int) -> int:
        """Stages for rows of so many bytes."""
        return max(1, min(self.stages, self.bytes // row))


ONE_AN_SM, TWO_AN_SM = Ring(), Ring(bytes=104 << 10)


class Sum(Protocol):
    """Which rows make up a token; its methods are traced inside the kernel."""

    def total(self) -> Scalar:
        """How many tokens there are."""
        ...

    def token(self, i: Scalar) -> Scalar:
        """The i-th of them, which may lie behind the end."""
        ...

    def choices(self, token: Scalar) -> tuple[Scalar, ...]:
        """Of each row that the token may have, in the order of the sum, its number."""
        ...

    def there(self, choice: Scalar) -> Scalar:
        """Whether a row has that number."""
        ...

    def row(self, token: Scalar, j: int, choice: Scalar) -> Any:
        """The memory of choice j."""
        ...

    def weights(self, token: Scalar) -> tuple[Scalar, ...]:
        """What the rows are multiplied by, or none."""
        ...


class Local(NamedTuple):
    """Rows of y [rows, d] on this rank, by slots [R * T, k]; tokens are listed."""

    y: Any
    slots: Any
    scale: Any
    tokens: Any
    count: Any

    def total(self) -> Scalar:
        return clamped(self.count[0], self.tokens.shape[0])

    def token(self, i: Scalar) -> Scalar:
        last = self.tokens.shape[0] - 1
        return clamped(self.tokens[clamped(i, last)], last)

    def choices(self, token: Scalar) -> tuple[Scalar, ...]:
        return tuple(self.slots[token, j] for j in range(self.slots.shape[1]))

    def there(self, choice: Scalar) -> Scalar:
        return (choice >= 0) & (choice < self.y.shape[0])

    def row(self, token: Scalar, j: int, choice: Scalar) -> Any:
        return self.y.at[choice]

    def weights(self, token: Scalar) -> tuple[Scalar, ...]:
        if self.scale is None:
            return ()
        return tuple(self.scale[token, j] for j in range(self.slots.shape[1]))


class Remote(NamedTuple):
    """Row me * T + t of partial [R * T, d] on each rank r with ranks[t, r]."""

    partial: Any
    ranks: Any
    peers: Ranks

    def total(self) -> Scalar:
        return jnp.int32(self._own.shape[0])

    def token(self, i: Scalar) -> Scalar:
        return clamped(i, self._own.shape[0] - 1)

    def choices(self, token: Scalar) -> tuple[Scalar, ...]:
        return tuple(self._own[token, rank] for rank in range(self.peers.count))

    def there(self, choice: Scalar) -> Scalar:
        return choice != 0

    def row(self, token: Scalar, j: int, choice: Scalar) -> Any:
        own = self.peers.rank() * self._own.shape[0] + token
        return self.peers.of(self.partial, jnp.int32(j)).at[own]

    def weights(self, token: Scalar) -> tuple[Scalar, ...]:
        return ()

    @property
    def _own(self) -> Any:
        return self.peers.own(self.ranks)


@lowered_once
def reduce_rows(
    y: jax.Array, slots: jax.Array, weights: jax.Array | None, tokens: jax.Array,
    count: jax.Array, *, ctas: int | None = None, ring: Ring = TWO_AN_SM, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out [R * T, d], out[token] = sum of weights[token, j] * y[slots[token, j]] over j.

    Of bfloat16 y [rows, d], d a multiple of 128, for the tokens among the first count[0] of
    `tokens`; slots outside of [0, rows) are left out, and rows of other tokens unwritten.
    """
    given = [y, slots, weights, tokens, count]
    operands = [x for x in given if x is not None]

    def rows(refs: Sequence[Any]) -> Sum:
        return Local(*refs[:2], refs[2] if weights is not None else None, *refs[-2:])

    ctas = ctas or 2 * backend.get_default_device().core_count
    out = jax.ShapeDtypeStruct((slots.shape[0], y.shape[1]), y.dtype)
    return _sum("reduce_rows", operands, rows, out, ALONE, ctas, ring, interpret)


@lowered_once
def combine(
    partial: jax.Array, ranks: jax.Array, *, peers: Ranks, ctas: int = CTAS,
    ring: Ring = ONE_AN_SM, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out [T, d], out[t] = sum of rank r's partial [R * T, d][me * T + t] over r with ranks[t, r].

    partial is bfloat16, d a multiple of 128; ranks [T, R] bool or int32.
    """
    operands = [partial, ranks.astype(jnp.int32)]
    shape = (*peers.stacked, ranks.shape[-2], partial.shape[-1])
    out = jax.ShapeDtypeStruct(shape, partial.dtype)

    def rows(refs: Sequence[Any]) -> Sum:
        return Remote(*refs, peers)

    return _sum("combine_ranks", operands, rows, out, peers, ctas, ring, interpret)


def _sum(
    name: str, operands: Sequence[jax.Array], rows: Callable[[Sequence[Any]], Sum],
    out: jax.ShapeDtypeStruct, peers: Ranks, ctas: int, ring: Ring, interpret: Any,
) -> jax.Array:  # fmt: skip
    width = out.shape[-1]
    columns, vector = columns_of(width)
    stages = ring.fitting(columns * out.dtype.itemsize)
    layout = plgpu.Layout.WG_STRIDED((columns,), vector)

    def kernel(*refs: Any, ring: Any, full: Any, empty: Any, done: Any = None) -> None:
        sums, pieces = rows(refs[:-1]), width // columns
        stage = Stages(ring, full, empty, layout)

        @pl.when(lax.axis_index("wg") == 0)
        def _() -> None:
            add = functools.partial(_add, sums, stage, peers.own(refs[-1]))
            _walk(sums, pieces, add)
            peers.finish(done)

        @pl.when(lax.axis_index("wg") == 1)
        def _() -> None:
            fetch = functools.partial(_fetch_all, sums, pieces, stage)
            if interpret is None:  # one warp: others would take issue slots to no purpose
                plgpu.warp_map(lambda warp: pl.when(warp == 0)(fetch))
            else:
                fetch()

    launch = plgpu.kernel(
        kernel, out_type=out, **peers.grid(ctas), num_threads=2, thread_name="wg",
        scratch_types=dict(
            ring=plgpu.SMEM((stages, columns), out.dtype), full=plgpu.Barrier(num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages), **peers.semaphores(),
        ),
        kernel_name=name, interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    return unfused(launch)(*operands)


class Stages(NamedTuple):
    """The ring [stages, columns], of which row n takes stage n % stages, and its barriers."""

    ring: Any
    full: Any
    empty: Any
    layout: Any

    def of(self, n: Scalar) -> Scalar:
        return lax.rem(n, jnp.int32(self.ring.shape[0]))

    def fetch(self, n: Scalar, row: Any) -> None:
        stage = self.of(n)

        @pl.when(n >= self.ring.shape[0])
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[stage])

        plgpu.copy_gmem_to_smem(row, self.ring.at[stage], self.full.at[stage], oob_mode=INSIDE)

    def add_up(
        self, used: Scalar, there: Sequence[Scalar], weights: Sequence[Scalar]
    ) -> tuple[jax.Array, Scalar]:
        """The sum of the next rows of those that are there, in order, and `used` with them."""
        total, most = self.zeros(), self.ring.shape[0]
        for first in range(0, len(there), most):  # more could not be in the ring at once
            part = slice(first, first + most)
            total, used = self._add(total, used, there[part], weights[part])
        return total, used

    def _add(
        self, total: jax.Array, used: Scalar, there: Sequence[Scalar], weights: Sequence[Scalar]
    ) -> tuple[jax.Array, Scalar]:
        places = []
        for named in there:
            places.append(self.of(used))
            pl.when(named)(functools.partial(plgpu.barrier_wait, self.full.at[places[-1]]))
            used += named.astype(jnp.int32)
        for j, (named, place) in enumerate(zip(there, places, strict=True)):

            def more(total: jax.Array, j: int = j, place: Scalar = place) -> jax.Array:
                row = plgpu.load(self.ring.at[place], layout=self.layout, optimized=False)
                row = row.astype(jnp.float32)
                return total + (row * weights[j] if weights else row)

            total = lax.cond(named, more, lambda total: total, total)
        plgpu.commit_smem()  # the rows have been read, says this to copies that overwrite them
        for named, place in zip(there, places, strict=True):
            pl.when(named)(functools.partial(plgpu.barrier_arrive, self.empty.at[place]))
        return total, used

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(self.ring.shape[1:], jnp.float32), self.layout)


def _walk(sums: Sum, pieces: int, visit: Callable[..., Scalar]) -> Scalar:
    """used = visit(used, token, piece, choices) for this CTA's pieces of tokens, one by one.

    `used` counts rows. What is read of a token is asked for a step before, its number two steps.
    """
    cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
    total = sums.total() * pieces
    each, over = lax.div(total, ctas), lax.rem(total, ctas)
    first, own = cta * each + lax.min(cta, over), each + (cta < over).astype(jnp.int32)

    def token(i: Scalar) -> Scalar:
        return sums.token(lax.div(first + i, jnp.int32(pieces)))

    def step(i: Scalar, carry: Any) -> Any:
        used, (now, found, weights), upcoming = carry
        coming = (upcoming, sums.choices(upcoming), sums.weights(upcoming)), token(i + 2)
        piece = lax.rem(first + i, jnp.int32(pieces))
        return visit(used, now, piece, found, weights), *coming

    start = token(jnp.int32(0))
    found = start, sums.choices(start), sums.weights(start)
    return lax.fori_loop(0, own, step, (jnp.int32(0), found, token(jnp.int32(1))))[0]


def _fetch_all(sums: Sum, pieces: int, stages: Stages) -> None:
    used = _walk(sums, pieces, functools.partial(_fetch, sums, stages))

    @pl.loop(lax.max(jnp.int32(0), used - stages.ring.shape[0]), used)
    def _(n: Scalar) -> None:
        plgpu.barrier_wait(stages.empty.at[stages.of(n)])


def _fetch(
    sums: Sum, stages: Stages, used: Scalar, token: Scalar, piece: Scalar,
    choices: Sequence[Scalar], _: Any,
) -> Scalar:  # fmt: skip
    columns = stages.ring.shape[1]
    for j, choice in enumerate(choices):

        @pl.when(sums.there(choice))
        def _(j: int = j, choice: Scalar = choice, used: Scalar = used) -> None:
            row = sums.row(token, j, choice)
            stages.fetch(used, row.at[pl.ds(piece * columns, columns)])

        used += sums.there(choice).astype(jnp.int32)
    return used


def _add(
    sums: Sum, stages: Stages, out: Any, used: Scalar, token: Scalar, piece: Scalar,
    choices: Sequence[Scalar], weights: Sequence[Scalar],
) -> Scalar:  # fmt: skip
    columns, there = stages.ring.shape[1], [sums.there(choice) for choice in choices]
    total, used = stages.add_up(used, there, weights)
    out.at[token, pl.ds(piece * columns, columns)][...] = total.astype(out.dtype)
    return used


def clamped(x: Scalar, most: int) -> Scalar:
    """x clamped to [0, most]; warps know no `lax.clamp`."""
    return lax.max(jnp.int32(0), lax.min(x, jnp.int32(most)))


def columns_of(width: int) -> tuple[int, int]:
    """How a row is divided: columns summed at once, and neighbours that a thread takes."""
    vector = math.gcd(width // THREADS, VECTOR)
    parts = width // (THREADS * vector)
    most = MOST_COLUMNS // (THREADS * vector)
    return THREADS * vector * max(n for n in range(1, most + 1) if parts % n == 0), vector
