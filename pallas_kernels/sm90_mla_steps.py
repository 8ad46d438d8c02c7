"""What the two multiplying warpgroups of paged decode do with a piece of a request: scores, weights
and sums of pairs of pages, as `sm90_mla_decode` says."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_mla_pages import (
    HALF,
    KEY,
    PAGE,
    PARTS,
    QUARTER,
    QUARTERS,
    ROPE,
    ROWS,
    Decode,
    Piece,
    Scalar,
    block,
)
from pallas_kernels.sm90_mla_plan import STEP
from pallas_kernels.sm90_registers import (
    broadcast,
    for_wgmma,
    opaque_zero,
    product,
    rescale,
    store_rows,
)

LOG2E = math.log2(math.e)
MMA = plgpu.Layout.WGMMA
ROW, COL = MMA.reduce(1), MMA.reduce(0)
SLACK = 8.0  # by how much (base 2) a maximum may be exceeded before all is rescaled
LOWEST = -1e30  # a running maximum to start from: finite, so that masked rows give no NaN


def attend(call: Decode, refs: Any, wg: int, piece: Piece, done: Scalar) -> None:
    """A piece, as warpgroup `wg` does it: scores of the pages with that parity, its columns."""
    plgpu.barrier_wait(refs.key_full)
    query = _rope_query(refs)
    (plgpu.barrier_wait if wg == 0 else plgpu.barrier_arrive)(refs.q_held)
    plgpu.barrier_wait(refs.q_full)
    whole = lax.div(lax.max(piece.length - call.hidden, 0), jnp.int32(STEP))
    middle = lax.max(piece.first, lax.min(whole, piece.last))
    if call.source == "chosen":
        middle = piece.first
    step = functools.partial((_even, _odd)[wg], call, refs, piece, query, done - piece.first)
    carry = (
        (plgpu.layout_cast(jnp.zeros((ROWS, QUARTER), jnp.float32), MMA),) * 2,
        plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
    )
    carry = lax.fori_loop(piece.first, middle, functools.partial(step, masked=False), carry)
    carry = lax.fori_loop(middle, piece.last, functools.partial(step, masked=True), carry)
    _finish(call, refs, wg, piece, *carry)
    plgpu.barrier_arrive(refs.q_empty)


def _rope_query(refs: Any) -> jax.Array:
    """The part with position, in registers as WGMMA's first operand. Warpgroup 0, which writes
    weights in its place, waits until the other has it too."""
    if not refs.on_device:
        return refs.weights_s[0]
    return plgpu.load(refs.weights_s.at[0], layout=MMA, optimized=False)


def _own(wg: int) -> tuple[int, int]:
    """The quarters of the latents whose sums a warpgroup makes."""
    return 2 * wg, 2 * wg + 1


def _latents(refs: Any, slot: int, part: int, zero: Scalar = 0) -> Any:
    """A quarter of a page's latents."""
    return refs.latent_s.at[zero + slot * QUARTERS + part]


def _scores(refs: Any, wg: int, query: jax.Array, zero: Scalar) -> jax.Array:
    """The query times a page, whose parts are taken as they arrive: those that the other warpgroup
    sets free come last."""
    order = (*_own(wg), *_own(1 - wg))

    def issue(scores: Any) -> None:
        plgpu.barrier_wait(refs.full.at[wg * PARTS + KEY])
        plgpu.wgmma(scores, query, refs.rope_s.at[zero + wg].T)
        for part in order:
            plgpu.barrier_wait(refs.full.at[wg * PARTS + part])
            columns = refs.q_s.at[zero + part // 2, :, pl.ds(part % 2 * QUARTER, QUARTER)]
            plgpu.wgmma(scores, columns, _latents(refs, wg, part, zero).T)

    if refs.on_device:
        found = product((ROWS, PAGE), issue)
    else:  # the interpreter takes no first operand from registers
        for part in (KEY, *order):
            plgpu.barrier_wait(refs.full.at[wg * PARTS + part])
        pages = [*(_latents(refs, wg, part)[...] for part in range(QUARTERS)), refs.rope_s[wg]]
        both = (
            jnp.concatenate(x, axis=1).astype(jnp.float32)
            for x in ((refs.q_s[0], refs.q_s[1], query), pages)
        )
        found = jnp.dot(next(both), next(both).T)
    plgpu.barrier_arrive(refs.empty.at[wg * PARTS + KEY])
    return found


def _masked(
    call: Decode, refs: Any, wg: int, piece: Piece, number: Scalar, page: Scalar, scores: jax.Array
) -> jax.Array:
    """Scores without tokens that a query does not see; `number` counts all steps of this SM."""
    if call.source == "chosen":
        at = lax.rem(number, jnp.int32(2)) * STEP + wg * PAGE
        places = plgpu.load(refs.places_s.at[pl.ds(at, PAGE)], layout=COL, optimized=False)
        return jnp.where(broadcast(places, scores.shape, 1) >= 0, scores, -jnp.inf)
    token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=MMA) + page * PAGE
    if not call.hidden:
        return jnp.where(token < piece.length, scores, -jnp.inf)
    row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MMA) + block(call) * ROWS
    query = lax.div(row, lax.full_like(row, call.heads))
    return jnp.where(token < piece.length - call.hidden + query, scores, -jnp.inf)


def _clean(refs: Any, slot: int, valid: Scalar) -> None:
    """Zeros for what lies behind a request's last token: its weights are 0, but it may be NaN."""

    @pl.when(valid < PAGE)
    def _() -> None:
        for part in range(QUARTERS):
            for left in range(0, QUARTER, ROPE):
                piece = refs.latent_s.at[slot * QUARTERS + part, :, pl.ds(left, ROPE)]
                values = plgpu.load(piece, layout=MMA, optimized=False)
                row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=MMA)
                piece[...] = jnp.where(row < valid, values, jnp.zeros_like(values))
        plgpu.commit_smem()


def _weigh(
    call: Decode, refs: Any, wg: int, piece: Piece, page: Scalar, scores: jax.Array,
    highest: Callable[[], jax.Array], masked: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Weights of a page: (bound before, bound with it, the weights), in float32.

    Weights are powers of 2 of the scores less a bound that scores may exceed by SLACK, so that it
    seldom changes and sums are seldom rescaled. The other warpgroup is told the bound first.
    """
    factor = call.scale * LOG2E
    own = jnp.max(scores, axis=1) * factor
    before = highest()
    bound = jnp.where(own > before + SLACK, own, before)
    refs.rows_s.at[wg][...] = bound
    plgpu.barrier_arrive(refs.bound_full.at[wg])
    if masked and call.source == "pages":
        _clean(refs, wg, piece.length - page * PAGE)
    return before, bound, jnp.exp2(scores * factor - broadcast(bound, scores.shape))


def _told(refs: Any, wg: int) -> jax.Array:
    """The bound that the other warpgroup has found."""
    plgpu.barrier_wait(refs.bound_full.at[wg])
    return plgpu.load(refs.rows_s.at[wg], layout=ROW, optimized=False)


def _add(
    refs: Any, wg: int, out: tuple[jax.Array, ...], weights: Any, slot: int, zero: Scalar,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """out + weights x this warpgroup's columns of a page, which are set free; the weights are in
    registers or in shared memory. `meanwhile` is done under the products."""
    values = [_latents(refs, slot, part, zero) for part in _own(wg)]
    freed = [refs.empty.at[slot * PARTS + part] for part in _own(wg)]

    def run(*sums: Any) -> tuple[jax.Array, ...]:
        for ref, before in zip(sums, out, strict=True):
            ref[...] = before
        for ref, columns in zip(sums, values, strict=True):
            plgpu.wgmma(ref, weights, columns)
        meanwhile()
        for left, barrier in zip((1, 0), freed, strict=True):
            plgpu.wgmma_wait(left)
            plgpu.barrier_arrive(barrier)
        return tuple(ref[...] for ref in sums)

    if refs.on_device:
        return pl.run_scoped(run, *(plgpu.ACC((ROWS, QUARTER), jnp.float32),) * 2)
    meanwhile()
    known = weights[...].astype(jnp.float32)
    pages = (ref[...].astype(jnp.float32) for ref in values)
    out = tuple(x + jnp.dot(known, page) for x, page in zip(out, pages, strict=True))
    for barrier in freed:
        plgpu.barrier_arrive(barrier)
    return out


def _add_own(
    refs: Any, wg: int, out: tuple[jax.Array, ...], weights: jax.Array, zero: Scalar
) -> tuple[jax.Array, ...]:
    """The same of this warpgroup's own page; the other warpgroup is handed its weights."""
    rounded = weights.astype(refs.weights_s.dtype)

    def hand_over() -> None:
        refs.weights_s.at[wg][...] = rounded
        for_wgmma(refs.on_device)
        plgpu.barrier_arrive(refs.weights_full.at[wg])

    return _add(refs, wg, out, rounded, wg, zero, hand_over)


def _rescaled(refs: Any, out: tuple[jax.Array, ...], by: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(rescale(x, by, refs.on_device) for x in out)


def _even(call, refs, piece, query, earlier, i, carry, *, masked):
    """Warpgroup 0: scores of the even page, left columns of both."""
    out, highest, total = carry
    zero = opaque_zero(refs.on_device)
    scores = _scores(refs, 0, query, zero)
    if masked:
        scores = _masked(call, refs, 0, piece, earlier + i, 2 * i, scores)
    _, bound, weights = _weigh(call, refs, 0, piece, 2 * i, scores, lambda: highest, masked)
    by, sums = jnp.exp2(highest - bound), weights.sum(axis=1)
    out = _add_own(refs, 0, _rescaled(refs, out, by), weights, zero)
    total = total * by + sums
    latest = _told(refs, 1)
    by = jnp.exp2(bound - latest)
    out = _rescaled(refs, out, by)
    plgpu.barrier_wait(refs.weights_full.at[1])
    out = _add(refs, 0, out, refs.weights_s.at[zero + 1], 1, zero)
    return out, latest, total * by


def _odd(call, refs, piece, query, earlier, i, carry, *, masked):
    """Warpgroup 1: scores of the odd page, right columns of both. Its own page comes first: the
    other's will be wanted later."""
    out, highest, total = carry
    zero = opaque_zero(refs.on_device)
    scores = _scores(refs, 1, query, zero)
    if masked:
        scores = _masked(call, refs, 1, piece, earlier + i, 2 * i + 1, scores)
    before, bound, weights = _weigh(
        call, refs, 1, piece, 2 * i + 1, scores, lambda: _told(refs, 0), masked
    )
    by, sums = jnp.exp2(highest - bound), weights.sum(axis=1)
    out = _add_own(refs, 1, _rescaled(refs, out, by), weights, zero)
    plgpu.barrier_wait(refs.weights_full.at[0])
    others = plgpu.load(refs.weights_s.at[0], layout=MMA, optimized=False)
    others = others * broadcast(jnp.exp2(before - bound).astype(others.dtype), others.shape)
    out = _add(refs, 1, out, others, 0, zero)
    return out, bound, total * by + sums


def _finish(
    call: Decode, refs: Any, wg: int, piece: Piece, out: tuple[jax.Array, ...], highest: jax.Array,
    total: jax.Array,
) -> None:  # fmt: skip
    """Add up both warpgroups' sums of weights, divide, and store; whole output goes out by way of
    the query's shared memory, which is no longer needed."""
    refs.rows_s.at[2 + wg][...] = total
    plgpu.barrier_arrive(refs.sum_full.at[wg])
    plgpu.barrier_wait(refs.sum_full.at[1 - wg])
    total = total + plgpu.load(refs.rows_s.at[3 - wg], layout=ROW, optimized=False)
    some = jnp.where(total > 0, total, 1.0)
    share = 1.0 / some
    out = tuple(x * broadcast(share, x.shape) for x in out)
    lse = jnp.where(total > 0, highest + jnp.log2(some), LOWEST)
    row = block(call) * ROWS
    rows = pl.ds(row, ROWS)

    def partial() -> None:
        staged = refs.sums_s.at[wg]
        for part, values in zip(_own(wg), out, strict=True):
            staged[...] = values
            send(staged, refs.part_out.at[piece.slot, rows, pl.ds(part * QUARTER, QUARTER)])
        if wg == 0:
            refs.part_lse.at[piece.slot, rows][...] = lse

    def whole() -> None:
        staged = refs.staged_s.at[wg]
        for half, values in enumerate(out):
            columns = staged.at[:, pl.ds(half * QUARTER, QUARTER)]
            columns[...] = values.astype(refs.out.dtype)
        send(staged, refs.out.at[piece.request, rows, pl.ds(wg * HALF, HALF)])
        if wg == 0:
            natural = jnp.where(total > 0, lse * (1 / LOG2E), jnp.inf)
            store_rows(refs.lse.at[piece.request], natural, row, call.rows - row, refs.on_device)

    def send(staged: Any, place: Any) -> None:
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, place)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(piece.split, partial, whole)
