"""The steps of the backward kernel of MLA's attention: 128 keys, of which each warpgroup has 64,
and 64 queries at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_mla_backward_work import KEYS, QUERIES, Unit, unit_of
from pallas_kernels.sm90_registers import broadcast, for_wgmma, opaque, opaque_zero

Scalar = Any
CHUNK, ROPE, STAGES, ROWS = 64, 64, 2, 64
LOG2E = math.log2(math.e)
MMA = plgpu.Layout.WGMMA
ROW, COL = MMA.reduce(1), MMA.reduce(0)
LSE, DELTA = 0, 1


@dataclasses.dataclass(frozen=True)
class Call:
    """The static side: heads, keys, widths of queries and values, and how keys come."""

    heads: int
    keys: int
    q: int
    v: int
    rope_apart: bool
    packed: bool
    """Values stand behind the keys in one array, and so do their gradients."""
    scale: float
    plain: bool
    on_device: bool

    @property
    def rope(self) -> int:
        """Columns of the keys' gradients that are apart."""
        return ROPE if self.rope_apart else 0

    def values_in(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """The array in which they are, of keys and values, and their columns."""
        if not self.packed:
            return values, pl.ds(0, self.v)
        return keys, pl.ds(self.q - self.rope, self.v)

    @property
    def chunks(self) -> int:
        """Of dq's columns."""
        return self.q // CHUNK

    def own(self, wg: Scalar) -> Scalar | None:
        """The chunk that a warpgroup makes in every step."""
        return None if self.chunks == 1 else wg * (self.chunks - 1)

    @property
    def shared(self) -> int | None:
        """The chunk that they make in turn."""
        return None if self.chunks == 2 else self.chunks // 2


def units(call: Call, refs: Any, body: Callable[[Unit, Scalar, Scalar], None]) -> Scalar:
    """body(unit, its number, steps before it) for each of this CTA; returns the steps of all."""
    cta = lax.axis_index("cta")
    words = 1 if call.plain else 3

    def read(number: Scalar) -> tuple[Scalar, ...]:
        return tuple(refs.units[cta, number, word] for word in range(words))

    def some(number: Scalar, carry: tuple) -> tuple:
        done, now = carry
        after = read(number + 1)
        queries = refs.q.shape[1] // QUERIES
        unit = unit_of(now, call.plain, call.heads, call.keys // KEYS, queries)
        body(unit, number, done)
        return done + unit.count, after

    count = refs.units[cta, refs.units.shape[1] - 1, 0]
    return lax.fori_loop(0, count, some, (jnp.int32(0), read(0)))[0]


def slot_of(step: Scalar) -> Scalar:
    return lax.rem(step, jnp.int32(STAGES))


def differentiate(
    call: Call, refs: Any, wg: Scalar, unit: Unit, number: Scalar, done: Scalar
) -> None:
    plgpu.barrier_wait(refs.keys_full)
    step = functools.partial(_step, call, refs, wg, unit, done)

    def store(dk: jax.Array, dv: jax.Array) -> None:
        """By way of the keys' and values' shared memory, once nobody multiplies with them."""
        pl.when(unit.count > 0)(functools.partial(plgpu.barrier_wait, refs.ds_empty))
        at = unit.batch, pl.ds(unit.tile * KEYS + wg * ROWS, ROWS), unit.head
        zero = opaque_zero(call.on_device)
        values, keys = refs.v_s.at[wg + zero], refs.k_s
        values[...] = dv.astype(refs.dk.dtype)
        dk = (dk * call.scale).astype(refs.dk.dtype)
        first = wg * call.chunks + zero
        for chunk in range(call.chunks):
            keys.at[first + chunk][...] = dk[:, chunk * CHUNK : (chunk + 1) * CHUNK]
        plgpu.commit_smem()
        dv_ref, place = call.values_in(refs.dk, getattr(refs, "dv", None))
        plgpu.copy_smem_to_gmem(values, dv_ref.at[(*at, place)])
        for chunk in range(call.chunks):
            apart = call.rope and chunk == call.chunks - 1
            columns = pl.ds(chunk * CHUNK, CHUNK)
            place = refs.d_rope.at[at] if apart else refs.dk.at[(*at, columns)]
            plgpu.copy_smem_to_gmem(keys.at[first + chunk], place)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs.keys_empty)

    def steps(sums: Any) -> Any:
        clear, mixed = lax.min(unit.clear, unit.count), lax.min(unit.mixed, unit.count)
        sums = lax.fori_loop(0, clear, functools.partial(step, masked=True), sums)
        sums = lax.fori_loop(clear, mixed, functools.partial(step, masked=False), sums)
        if not call.plain:
            sums = lax.fori_loop(mixed, unit.count, functools.partial(step, masked=True), sums)
        return sums

    widths = (call.q, call.v)
    if not call.on_device:
        store(*steps(tuple(jnp.zeros((ROWS, width), jnp.float32) for width in widths)))
        return

    def run(*sums: Any) -> None:
        refs.sums = sums
        steps(())
        store(*(ref[...] for ref in sums))

    pl.run_scoped(run, *(plgpu.ACC((ROWS, width), jnp.float32) for width in widths))


def _step(
    call: Call,
    refs: Any,
    wg: Scalar,
    unit: Unit,
    done: Scalar,
    i: Scalar,
    sums: Any,
    *,
    masked: bool,
) -> Any:
    zero = opaque_zero(call.on_device)
    slot = slot_of(done + i) + zero
    weights = _weights(call, refs, wg, unit, i, slot, zero, masked)
    plgpu.barrier_wait(refs.d_out_full.at[slot])
    if call.on_device:
        plgpu.wgmma(refs.sums[1], weights, refs.d_out_s.at[slot])
        ds = weights.astype(jnp.float32) * _product(call, refs, wg, slot, zero, DELTA)
        ds = ds.astype(jnp.bfloat16)
        plgpu.wgmma(refs.sums[0], ds, refs.q_s.at[slot])
    else:
        ds = weights.astype(jnp.float32) * _product(call, refs, wg, slot, zero, DELTA)
        ds = ds.astype(jnp.bfloat16)
        sums = _interpreted_sums(refs, slot, weights, ds, sums)
    pl.when(i > 0)(functools.partial(plgpu.barrier_wait, refs.ds_empty))
    refs.ds_s.at[wg][...] = ds
    for_wgmma(call.on_device)
    plgpu.barrier_arrive(refs.ds_full)
    if call.on_device:
        plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(refs.empty.at[slot])
    plgpu.barrier_wait(refs.ds_full)
    if call.own(wg) is not None:
        _dq(call, refs, call.own(wg), zero, done + i, refs.own_empty.at[wg])
    if call.shared is not None:
        make = functools.partial(
            _dq, call, refs, call.shared, zero, done + i, refs.shared_empty.at[wg]
        )
        pl.when(lax.rem(done + i, jnp.int32(2)) == wg)(make)
    plgpu.barrier_arrive(refs.ds_empty)
    return sums


def _weights(call, refs, wg, unit, i, slot, zero, masked):
    """Of 64 keys for 64 queries: what the softmax gave."""
    plgpu.barrier_wait(refs.q_full.at[slot])
    scores = _product(call, refs, wg, slot, zero, LSE)
    if masked:
        scores = _masked(call, refs, wg, unit, i, scores)
    weights = jnp.exp2(scores * (call.scale * LOG2E)).astype(jnp.bfloat16)
    return opaque(weights, call.on_device)


def _masked(call, refs, wg, unit, i, scores):
    layout = dict(layout=MMA)
    query = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, **layout)
    query += (unit.first + i) * QUERIES
    first = unit.tile * KEYS + wg * ROWS
    if call.plain:
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, **layout) + first
        return jnp.where(query >= key, scores, -jnp.inf)
    begin, end = (
        broadcast(plgpu.load(refs.ends.at[unit.batch, k, pl.ds(first, ROWS)], layout=ROW,
                             optimized=False), scores.shape)
        for k in range(2)
    )  # fmt: skip
    return jnp.where((query >= begin) & (query < end), scores, -jnp.inf)


def _product(call, refs, wg, slot, zero, row):
    """Keys times queries, or values times d_out, plus a statistic of the queries: the sums start
    from it, which costs no register."""
    statistic = plgpu.load(refs.statistics_s.at[2 * slot + row], layout=COL, optimized=False)
    start = broadcast(statistic, (ROWS, QUERIES), 1)
    if row == DELTA:
        pairs = [(refs.v_s.at[wg + zero], refs.d_out_s.at[slot])]
    else:
        pairs = [
            (refs.k_s.at[wg * call.chunks + chunk + zero],
             refs.q_s.at[slot, :, pl.ds(chunk * CHUNK, CHUNK)])
            for chunk in range(call.chunks)
        ]  # fmt: skip
    if not call.on_device:
        return start + sum(
            jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32).T) for a, b in pairs
        )

    def run(accumulator: Any) -> jax.Array:
        accumulator[...] = start
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b.T)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, QUERIES), jnp.float32))


def _interpreted_sums(refs, slot, weights, ds, sums):
    def add(total, a, b):
        return total + jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32))

    return add(sums[0], ds, refs.q_s[slot]), add(sums[1], weights, refs.d_out_s[slot])


def _dq(call, refs, chunk, zero, step, free):
    """A chunk of dq's columns, of all 128 keys, to shared memory."""

    def run(accumulator: Any) -> jax.Array:
        for half in range(2):
            keys = refs.k_s.at[zero + half * call.chunks + chunk]
            plgpu.wgmma(accumulator, refs.ds_s.at[zero + half].T, keys)
        return accumulator[...]

    if call.on_device:
        found = pl.run_scoped(run, plgpu.ACC((QUERIES, CHUNK), jnp.float32))
    else:
        found = sum(
            jnp.dot(refs.ds_s[half].astype(jnp.float32).T,
                    refs.k_s[half * call.chunks + chunk].astype(jnp.float32))
            for half in range(2)
        )  # fmt: skip
    pl.when(step > 0)(functools.partial(plgpu.barrier_wait, free))
    refs.dq_s.at[chunk][...] = found
    for_wgmma(call.on_device)
    plgpu.barrier_arrive(refs.dq_full.at[chunk])
