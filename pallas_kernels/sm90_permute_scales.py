"""Scales of rows that change places on Hopper: single words of K-block-major arrays.

`sm90_permute` walks the rows; its threads move their scales while the copies run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.utils import arith
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_threads as t
from pallas_kernels.checks import ceil_div

THREADS = 128
SCALAR, REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()
Scalar = Any


class Batches(NamedTuple):
    """`rows` rows, `each` at a time, dealt to the CTAs in turn."""

    rows: int
    each: int

    @property
    def total(self) -> int:
        return ceil_div(self.rows, self.each)

    def own(self) -> Scalar:
        """How many of them this CTA has."""
        cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
        return lax.div(self.total - cta + ctas - 1, jnp.int32(ctas))

    def first(self, i: Scalar) -> Scalar:
        """The first row of this CTA's batch i."""
        return (lax.axis_index("cta") + i * lax.axis_size("cta")) * self.each

    def indices(self, ref: Any, i: Scalar, choices: int = 1) -> tuple[Scalar, ...]:
        """Those of the batch, `choices` a row; of rows behind the end any."""
        start, last = self.first(i) * choices, jnp.int32(self.rows * choices - 1)
        return tuple(ref[lax.min(start + j, last)] for j in range(self.each * choices))


def inside(index: Scalar, of: int) -> Scalar:
    """The index clamped to [0, of). To be called late: it waits for what has been asked for."""
    return lax.clamp(jnp.int32(0), index, jnp.int32(of - 1))


@dataclasses.dataclass(frozen=True)
class _Scales:
    """The scales of a batch's rows, single words that threads load and store."""

    batches: Batches
    refs: Any

    def start(self) -> Any:
        return ()


class Gathered(_Scales):
    """scale_out[:, r] = scale[:, indices[r]].

    A thread has one row of a batch and some of its scales. It asks for the index two batches before
    it stores them, and for the scales one before.
    """

    def start(self) -> Any:
        if not self.refs.on_device:
            return ()
        first = jnp.int32(0)
        return self._indices(first + 1), self._values(self._indices(first))

    def step(self, i: Scalar, carry: Any) -> Any:
        if not self.refs.on_device:
            self._one_by_one(i)
            return ()
        indices, values = carry
        self._put(i, values)
        values = self._values(indices)
        return self._indices(i + 2), values

    def _one_by_one(self, i: Scalar) -> None:
        groups, height = self.refs.scale.shape
        for j, row in enumerate(self.batches.indices(self.refs.indices, i)):
            to = self.batches.first(i) + j

            @pl.when(to < self.batches.rows)
            def _(row: Scalar = row, to: Scalar = to) -> None:
                for group in range(groups):
                    self.refs.scale_out[group, to] = self.refs.scale[group, inside(row, height)]

    def _indices(self, i: Scalar) -> jax.Array:
        """Of this thread's row in batch i."""

        @plgpu.inline_mgpu(arg_types=(REF, SCALAR), return_type=_words(1))
        def run(_: Any, indices: Any, first: Any) -> Any:
            at = _least(self._row(first), self.batches.rows - 1)
            return t.array([t.load(t.row(t.memory(indices), at, 4))])

        return run(self.refs.indices, self.batches.first(i))

    def _values(self, indices: jax.Array) -> jax.Array:
        """The scales of the rows with those indices."""
        groups, height = self.refs.scale.shape

        @plgpu.inline_mgpu(arg_types=(REF, t.LANES), return_type=_words(self._turns))
        def run(_: Any, scale: Any, indices: Any) -> Any:
            (index,) = t.registers(indices)
            base = t.row(t.memory(scale), _clamped(index, height), 4)
            own = [_least(group, groups - 1) for group in self._groups()]
            return t.array([t.load(t.row(base, group, 4 * height)) for group in own])

        return run(self.refs.scale, indices)

    def _put(self, i: Scalar, values: jax.Array) -> None:
        groups, width = self.refs.scale_out.shape

        @plgpu.inline_mgpu(arg_types=(REF, SCALAR, _words(self._turns).layout))
        def run(_: Any, out: Any, first: Any, values: Any) -> None:
            row = self._row(first)
            there, base = t.less(row, self.batches.rows), t.row(t.memory(out), row, 4)
            for group, value in zip(self._groups(), t.registers(values), strict=True):
                inside = arith.andi(there, t.less(group, groups))
                _store_if(inside, t.row(base, group, 4 * width), value)

        run(self.refs.scale_out, self.batches.first(i), values)

    @property
    def _turns(self) -> int:
        return ceil_div(self.batches.each * self.refs.scale.shape[0], THREADS)

    def _row(self, first: Any) -> Any:
        return t.add(t.registers(first)[0], t.bits(_thread(), self.batches.each - 1))

    def _groups(self) -> list[Any]:
        own = t.down(_thread(), self.batches.each.bit_length() - 1)
        return [t.add(own, turn * (THREADS // self.batches.each)) for turn in range(self._turns)]


class Spread(_Scales):
    """scale_out[:, indices[token, j]] = scale[:, token]: a word for each group, token and j."""

    def step(self, i: Scalar, _: Any) -> Any:
        (self._all if self.refs.on_device else self._one_by_one)(i)
        return ()

    @property
    def _choices(self) -> int:
        return self.refs.indices.shape[0] // self.batches.rows

    def _one_by_one(self, i: Scalar) -> None:
        groups, slots = self.refs.scale_out.shape
        found = self.batches.indices(self.refs.indices, i, self._choices)
        for j, slot in enumerate(found):
            token = self.batches.first(i) + j // self._choices

            @pl.when(token < self.batches.rows)
            def _(token: Scalar = token, slot: Scalar = slot) -> None:
                to = inside(slot, slots)
                for group in range(groups):
                    self.refs.scale_out[group, to] = self.refs.scale[group, token]

    def _all(self, i: Scalar) -> None:
        words = self.batches.each * self._choices * self.refs.scale.shape[0]

        @plgpu.inline_mgpu(arg_types=(REF, REF, REF, SCALAR))
        def run(_: Any, out: Any, scale: Any, indices: Any, first: Any) -> None:
            bases = [t.memory(ref) for ref in (out, scale, indices)]
            starts = range(0, words, THREADS)
            loaded = [self._load(*bases, t.registers(first)[0], start) for start in starts]
            for word in loaded:
                _store_if(*word)

        run(self.refs.scale_out, self.refs.scale, self.refs.indices, self.batches.first(i))

    def _load(self, out: Any, scale: Any, indices: Any, first: Any, start: int) -> Sequence[Any]:
        """Word `start` + thread of the batch: whether there is one, its address, the word."""
        (groups, tokens), slots = self.refs.scale.shape, self.refs.scale_out.shape[1]
        pairs = self.batches.each * self._choices
        word = t.add(_thread(), start)
        group, pair = arith.divui(word, t.const(pairs)), arith.remui(word, t.const(pairs))
        token = t.add(first, arith.divui(pair, t.const(self._choices)))
        there = arith.andi(t.less(group, groups), t.less(token, tokens))
        at = _least(t.add(t.times(first, self._choices), pair), slots - 1)
        slot = _clamped(t.load(t.row(indices, at, 4)), slots)
        line = t.row(scale, _least(group, groups - 1), 4 * tokens)
        value = t.load(t.row(line, _least(token, tokens - 1), 4))
        return there, t.row(t.row(out, group, 4 * slots), slot, 4), value


def _words(each: int) -> Any:
    """So many words a thread."""
    shape = (each * THREADS,)
    return plgpu.ShapeDtypeStruct(shape, jnp.int32, plgpu.Layout.WG_STRIDED(shape, 1))


def _thread() -> Any:
    warp, lane = t.thread()
    return t.add(t.times(warp, 32), lane)


def _least(x: Any, most: int) -> Any:
    return t.choose(t.less(x, most), x, most)


def _clamped(index: Any, of: int) -> Any:
    return t.choose(t.less(index, 0), 0, _least(index, of - 1))


def _store_if(there: Any, address: Any, word: Any) -> None:
    t.ptx(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }",
        "l,r,r", address, word, t.choose(there, 1, 0),
    )  # fmt: skip
