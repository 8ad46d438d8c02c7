"""One warpgroup's 64 rows of attention on Hopper: products, masks and softmax of every unit.

The steps of all units form one pipeline: S = Q K^T of a step and O += P V of the step before it are
issued together, also where a unit ends and the next begins.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_mla_schedule as schedule
from pallas_kernels.sm90_mla_schedule import TILE

WARPGROUPS, ROWS = 2, 64  # queries of a warpgroup
STAGED = 64  # columns of output on their way out: one line of 128 bytes a row
LOG2E = math.log2(math.e)
LEAST = -1e30  # where running maxima start: unlike -inf, no NaN where a row sees none of a tile
ROW, ACC = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA
Scalar = Any
Refs = types.SimpleNamespace


class Unit(NamedTuple):
    """128 queries of a head, and what they see: see `schedule.Ranges`."""

    batch: Scalar
    head: Scalar
    tile: Scalar
    last: Scalar
    count: Scalar
    clear: Scalar
    mixed: Scalar


class State(NamedTuple):
    """Of 64 queries: maximum (in powers of two) and sum of the weights so far, the weights of the
    last step, and the sums of values, which on the device lie in an accumulator instead."""

    most: jax.Array
    total: jax.Array
    weights: jax.Array
    sums: Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static side of the kernel: numbers of heads and of tiles of queries, widths."""

    heads: int
    tiles: int
    width: int  # of queries
    rope: int  # of the shared part of keys, 0 for none
    values: int
    packed: bool  # values stand behind the keys in one array
    scale: float
    plain: bool
    on_device: bool

    @property
    def stages(self) -> int:
        """Tiles of keys and of values in shared memory."""
        return 2 if self.width + self.values > 128 else 4

    def slot(self, step: Scalar) -> Scalar:
        return lax.rem(step, jnp.int32(self.stages))

    def read(self, refs: Refs, number: Scalar) -> tuple[Scalar, ...]:
        """The words of this CTA's unit of that number."""
        cta = lax.axis_index("cta")
        return tuple(refs.table[cta, number, i] for i in range(refs.table.shape[2]))

    def count(self, refs: Refs) -> Scalar:
        return refs.table[lax.axis_index("cta"), refs.table.shape[1] - 1, 0]

    def unit(self, words: tuple[Scalar, ...]) -> Unit:
        tile = lax.rem(words[0], jnp.int32(self.tiles))
        row = lax.div(words[0], jnp.int32(self.tiles))
        batch, head = lax.div(row, jnp.int32(self.heads)), lax.rem(row, jnp.int32(self.heads))
        if self.plain:
            return Unit(batch, head, tile, tile + 1, tile + 1, 1, tile + 1)
        last, count, clear, mixed = (half for word in words[1:] for half in schedule.halves(word))
        return Unit(batch, head, tile, last, count, clear, mixed)


def turn(op: str, whose: Scalar) -> None:
    """bar.sync to wait for a warpgroup's turn, bar.arrive to hand it over."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def barrier(_: Any, number: Any) -> None:
        (register,) = number.registers.flat
        ptx = f"bar.{op} $0, {WARPGROUPS * 128};"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [register], ptx, "r", has_side_effects=True)

    barrier(whose + 8)


@dataclasses.dataclass(frozen=True)
class Rows:
    """One warpgroup's 64 rows of every unit."""

    how: Shape
    refs: Refs
    wg: Scalar
    sums_ref: Any

    def attend(self) -> None:
        how, refs = self.how, self.refs
        words, after = how.read(refs, 0), how.read(refs, 1)
        plgpu.barrier_wait(refs.q_full.at[self.wg])
        state = self._first(how.unit(words))

        def unit(number: Scalar, carry: tuple) -> tuple:
            step, words, after, state = carry
            later = how.read(refs, number + 2)
            step, state = self._steps(step, how.unit(words), state)
            plgpu.barrier_wait(refs.q_full.at[self.wg])
            return step, after, later, self._next(step, how.unit(words), how.unit(after), state)

        carry = jnp.int32(0), words, after, state
        step, words, _, state = lax.fori_loop(0, how.count(refs) - 1, unit, carry)
        step, state = self._steps(step, how.unit(words), state)
        self._store(how.unit(words), state, self._last(step - 1, state))
        plgpu.wait_smem_to_gmem(0)

    def _first(self, unit: Unit) -> State:
        """The first step of all, which has no product with values to go with."""
        plgpu.barrier_wait(self.refs.k_full.at[0])

        def product(scores_ref: Any) -> jax.Array:
            self._multiply_keys(scores_ref, 0)
            return scores_ref[...]

        scores = pl.run_scoped(product, plgpu.ACC((ROWS, TILE), jnp.float32))
        plgpu.barrier_arrive(self.refs.k_empty.at[0])
        return self._begin(unit, scores)

    def _steps(self, first: Scalar, unit: Unit, state: State) -> tuple[Scalar, State]:
        """All further steps of a unit, but for the last one's product with values."""

        def step(i: Scalar, state: State) -> State:
            def then(scores: jax.Array, sums: Callable[[], jax.Array]) -> State:
                self._release_queries(i == unit.count - 1)
                if not self.how.plain:
                    inside = (i >= unit.clear) & (i < unit.mixed)
                    hide = functools.partial(self._hide, unit, i)
                    scores = lax.cond(inside, lambda scores: scores, hide, scores)
                most, total, weights, shrink = self._softmax(scores, state)
                found = sums()
                weights = weights.astype(jnp.bfloat16)
                return State(most, total, weights, self._keep(found * _spread(shrink, found)))

            return self._both(first + i, state, then)

        return first + unit.count, lax.fori_loop(1, unit.count, step, state)

    def _next(self, step: Scalar, unit: Unit, after: Unit, state: State) -> State:
        """The first step of the unit after this one, with this one's last product."""

        def then(scores: jax.Array, sums: Callable[[], jax.Array]) -> State:
            return self._begin(after, scores, lambda: (unit, state, sums()))

        return self._both(step, state, then)

    def _begin(
        self, unit: Unit, scores: jax.Array, before: Callable[[], tuple] | None = None
    ) -> State:
        """Weights of a unit's first step; `before` gives what to store of the unit before it."""
        self._release_queries(unit.count == 1)
        none = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        least = plgpu.layout_cast(jnp.full((ROWS,), LEAST, jnp.float32), ROW)
        fresh = State(least, none, none, None)
        most, total, weights, _ = self._softmax(self._hide(unit, 0, scores), fresh)
        done = before() if before else None
        weights = weights.astype(jnp.bfloat16)  # not while a product reads the ones before
        if done:
            self._store(*done)
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, self.how.values), jnp.float32), ACC)
        return State(most, total, weights, self._keep(zeros))

    def _both(self, step: Scalar, state: State, then: Callable[..., State]) -> State:
        """Q K^T of the step and P V of the one before; then(scores, sums)."""
        refs, key, value = self.refs, self.how.slot(step), self.how.slot(step - 1)
        plgpu.barrier_wait(refs.k_full.at[key])
        if self.how.on_device:
            turn("sync", self.wg)

        def products(scores_ref: Any) -> State:
            self._multiply_keys(scores_ref, key)
            plgpu.barrier_wait(refs.v_full.at[value])
            if self.how.on_device:
                plgpu.wgmma(self.sums_ref, state.weights, refs.v_s.at[value])
                turn("arrive", 1 - self.wg)
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(refs.k_empty.at[key])
            return then(scores, lambda: self._sums(value, state))

        return pl.run_scoped(products, plgpu.ACC((ROWS, TILE), jnp.float32))

    def _last(self, step: Scalar, state: State) -> jax.Array:
        value = self.how.slot(step)
        plgpu.barrier_wait(self.refs.v_full.at[value])
        if self.how.on_device:
            plgpu.wgmma(self.sums_ref, state.weights, self.refs.v_s.at[value])
        return self._sums(value, state)

    def _multiply_keys(self, scores_ref: Any, slot: Scalar) -> None:
        refs, rope = self.refs, self.how.rope
        if not rope:
            plgpu.wgmma(scores_ref, refs.q_s.at[self.wg], refs.k_s.at[slot].T)
            return
        split = self.how.width - rope
        plgpu.wgmma(scores_ref, refs.q_s.at[self.wg, :, pl.ds(0, split)], refs.k_s.at[slot].T)
        rotary = refs.q_s.at[self.wg, :, pl.ds(split, rope)]
        plgpu.wgmma(scores_ref, rotary, refs.rope_s.at[slot].T)

    def _sums(self, slot: Scalar, state: State) -> jax.Array:
        """With the product under way; the interpreter, which has no A in registers, makes it."""
        if self.how.on_device:
            sums = plgpu.wgmma_accumulator_load(self.sums_ref, wait_n=0)
        else:
            values = self.refs.v_s[slot].astype(jnp.float32)
            plgpu.commit_smem()  # threads have read them here, not the tensor core
            sums = jnp.dot(state.weights.astype(jnp.float32), values) + state.sums
        plgpu.barrier_arrive(self.refs.v_empty.at[slot])
        return sums

    def _keep(self, sums: jax.Array) -> jax.Array | None:
        if not self.how.on_device:
            return sums
        self.sums_ref[...] = sums
        return None

    def _release_queries(self, done: Scalar) -> None:
        @pl.when(done)
        def _() -> None:
            plgpu.barrier_arrive(self.refs.q_empty.at[self.wg])

    def _hide(self, unit: Unit, step: Scalar, scores: jax.Array) -> jax.Array:
        """Scores of keys outside the queries' intervals become -inf."""
        row, col = (
            plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=ACC) for axis in (0, 1)
        )
        if self.how.plain:
            return jnp.where(row + self.wg * ROWS >= col, scores, -jnp.inf)
        rows = pl.ds(unit.tile * TILE + self.wg * ROWS, ROWS)
        start = (unit.last - 1 - step) * TILE
        low, high = (
            plgpu.load(self.refs.ends.at[unit.batch, i, rows], layout=ROW, optimized=False) - start
            for i in range(2)
        )
        seen = (col >= _spread(low, scores)) & (col < _spread(high, scores))
        return jnp.where(seen, scores, -jnp.inf)

    def _softmax(
        self, scores: jax.Array, state: State
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(most, total, weights, the factor by which earlier sums shrink)."""
        scale = self.how.scale * LOG2E
        most = jnp.maximum(state.most, scores.max(axis=1) * scale)
        weights = jnp.exp2(scores * scale - _spread(most, scores))
        shrink = jnp.exp2(state.most - most)
        return most, state.total * shrink + weights.sum(axis=1), weights, shrink

    def _store(self, unit: Unit, state: State, sums: jax.Array) -> None:
        rows = pl.ds(unit.tile * TILE + self.wg * ROWS, ROWS)
        none = state.total == 0
        share = jnp.where(none, 0.0, 1.0 / state.total)
        out = (sums * _spread(share, sums)).astype(jnp.bfloat16)
        staged, at = self.refs.out_s.at[self.wg], (unit.batch, rows, unit.head)
        for first in range(0, self.how.values, STAGED):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = out[:, first : first + STAGED]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, self.refs.out.at[(*at, pl.ds(first, STAGED))])
        lse = (state.most + jnp.log(state.total) * LOG2E) * (1 / LOG2E)
        self.refs.lse.at[unit.batch, unit.head, rows][...] = jnp.where(none, jnp.inf, lse)


def _spread(row: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(row, like.shape, [0])
