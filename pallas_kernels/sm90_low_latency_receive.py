"""Tokens out of the inbox of a decoding step into the rows of their experts, on Hopper.

A CTA has a few tokens, which it fetches as soon as all have come. Meanwhile it reads what all of
them chose, a bit for each token that an expert of this rank has, and counts those before its own:
so CTAs need not hear of one another, and rows lie by rank and token in every run. Then it stores
its tokens in their rows. Interpreted, where nobody waits, places are worked out by jnp.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_threads as t
from pallas_kernels import sm90_token_bits as bits
from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.expert_layout import slots_by_expert
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE
from pallas_kernels.sm90_low_latency import (
    CTAS,
    INCOMING,
    INSIDE,
    MOST_BARRIERS,
    SMEM,
    WORDS,
    Buffers,
    Plan,
    Refs,
    Scalar,
)
from pallas_kernels.sm90_peers import wait_for
from pallas_kernels.sm90_token_bits import THREADS, WARPS, WORD

SCALAR, REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()
PLACES = "slots", "weights_out", "counts"
Received = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def fits(rows: int, width: int, choices: int, experts: int) -> bool:
    """Whether CTAS hold so many tokens, of all ranks, beside what has to be known of them."""
    return ceil_div(rows, CTAS) <= _most(rows, width, choices, experts)


def _most(rows: int, width: int, choices: int, experts: int) -> int:
    """Tokens of a CTA."""
    known = ceil_div(rows, THREADS) * experts * WARPS * WORD
    scales = ceil_div(width, TILE * WORDS) * WORDS
    return min(MOST_BARRIERS, (SMEM - known) // (width + (scales + choices) * WORD))


@lowered_once
def dispatch_receive(
    buffers: Buffers, *, plan: Plan, ctas: int = CTAS, interpret: Any = None
) -> Received:
    """(q [E, R * T, d], scale [E, R * T, d / 128], counts [E], slots [R * T, k], weights).

    Of the round that `dispatch_send` began on all ranks. A token has one row for each of this
    rank's experts that it chose, which is row slots[s * T + t, j] of E * R * T; slots are -1 for
    choices elsewhere. An expert's rows past its count are unwritten.
    """
    peers, rows = plan.peers, plan.rows
    most = _most(rows, plan.width, plan.choices, plan.experts)
    ctas = max(min(ctas, rows), ceil_div(rows, most))
    each, places = ceil_div(rows, ctas), plan.experts * rows
    scales, _ = plan.row_words

    def of(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((*peers.stacked, *shape), dtype)

    moved = [of((places, plan.tiles, TILE), E4M3), of((places, scales), jnp.float32)]
    known = [
        of((rows, plan.choices), jnp.int32), of((rows, plan.choices), jnp.float32),
        of((plan.experts,), jnp.int32),
    ]  # fmt: skip
    given = [] if interpret is None else _placed(buffers, plan)
    names = [*INCOMING, "rank", *PLACES[: len(given)], "q_out", "scale_out", *PLACES[len(given) :]]

    def kernel(*refs: Any, **memory: Any) -> None:
        _receive(Refs(**dict(zip(names, refs, strict=True)), **memory), plan, interpret is None)

    memory = dict(
        q_s=plgpu.SMEM((each, plan.tiles, TILE), E4M3),
        scale_s=plgpu.SMEM((each, scales), jnp.float32),
        slots_s=plgpu.SMEM((each, plan.choices), jnp.int32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=each),
    )  # fmt: skip
    if interpret is None:
        words = plan.experts * WARPS
        memory["masks"] = plgpu.SMEM((ceil_div(rows, THREADS), words), jnp.int32)
    found = plgpu.kernel(
        kernel, out_type=moved if given else moved + known, **peers.grid(ctas),
        scratch_types=memory, kernel_name="dispatch_receive", interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*buffers.incoming, buffers.rank, *given)  # fmt: skip
    q, scale, slots, weights, counts = lax.optimization_barrier([*found, *given])  # see `in_place`
    q = q.reshape(*peers.stacked, plan.experts, rows, plan.width)
    scale = scale.reshape(*peers.stacked, plan.experts, rows, scales)
    return q, scale[..., : plan.tiles], counts, slots, weights


def _placed(buffers: Buffers, plan: Plan) -> list[jax.Array]:
    """Slots, weights and counts of all ranks on one card."""
    experts, weights = (x[...][..., : plan.choices] for x in (buffers.experts, buffers.weights))
    found = [
        slots_by_expert(own, rank * plan.experts, plan.experts) for rank, own in enumerate(experts)
    ]
    slots, counts = (jnp.stack(part) for part in zip(*found, strict=True))
    return [slots, weights, counts]


def _receive(refs: Refs, plan: Plan, told: bool) -> None:
    """`told`: others count what they send, and places are worked out here."""
    for name in (*INCOMING, "rank", *PLACES, "q_out", "scale_out"):
        setattr(refs, name, plan.peers.own(getattr(refs, name)))
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
    own = lax.div(plan.rows - cta + (ctas - 1), jnp.int32(ctas))
    turn, first = refs.turns[0] + 1, refs.rank[0] * plan.experts
    if told:
        _clear(refs.masks)
        wait_for(refs.tokens_in, turn * (plan.peers.count * plan.senders))

    @pl.loop(0, own)
    def _(i: Scalar) -> None:
        for ref, to in ((refs.q, refs.q_s), (refs.scale, refs.scale_s)):
            row = ref.at[cta + i * ctas]
            plgpu.copy_gmem_to_smem(row, to.at[i], refs.full.at[i], oob_mode=INSIDE)

    if told:
        _mark(refs, plan, first)
        _place(refs, plan, cta, first)
        pl.when(cta == 0)(lambda: _put_counts(refs.masks, refs.counts))
    else:

        @pl.loop(0, own)
        def _(i: Scalar) -> None:
            for j in range(plan.choices):
                refs.slots_s[i, j] = refs.slots[cta + i * ctas, j]

    @pl.loop(0, own)
    def _(i: Scalar) -> None:
        plgpu.barrier_wait(refs.full.at[i])
        _store(refs, [refs.slots_s[i, j] for j in range(plan.choices)], i)

    plgpu.wait_smem_to_gmem(0)

    @pl.when(cta == 0)
    def _() -> None:
        refs.turns[1] = turn


def _store(refs: Refs, slots: list[Scalar], i: Scalar) -> None:
    """A token in all of its rows, once in each."""
    for j, slot in enumerate(slots):
        anew = slot >= 0
        for other in slots[:j]:
            anew &= slot != other

        @pl.when(anew)
        def _(slot: Scalar = slot) -> None:
            plgpu.copy_smem_to_gmem(refs.q_s.at[i], refs.q_out.at[slot])
            plgpu.copy_smem_to_gmem(refs.scale_s.at[i], refs.scale_out.at[slot])


# --- places ------------------------------------------------------------------------------------


def _clear(masks: Any) -> None:
    count = masks.shape[0] * masks.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF,))
    def run(_: Any, masks: Any) -> None:
        for at, there in bits.columns(count):
            bits.store_if(there, t.add(t.shared(masks), t.times(at, WORD)), t.const(0))

    run(masks)


def _mark(refs: Refs, plan: Plan, first: Scalar) -> None:
    """A bit for every token in the masks of its experts here."""
    words, (_, row_words) = refs.masks.shape[1], plan.row_words

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR))
    def run(_: Any, experts: Any, masks: Any, first: Any) -> None:
        (first,), (warp, lane) = t.registers(first), t.thread()
        bit = t.ptx("shl.b32 $0, 1, $1;", "=r,r", lane, outputs=1)
        masks = t.add(t.shared(masks), t.times(warp, WORD))
        for sub, (token, there) in enumerate(bits.columns(plan.rows)):
            row = t.row(t.memory(experts), token, row_words * WORD)
            chosen = [x for at in range(0, row_words, WORDS) for x in _four(row, at * WORD)]
            for expert in chosen[: plan.choices]:
                mine = arith.subi(expert, first)
                here = arith.andi(t.within(mine, plan.experts), there)
                at = t.add(t.times(t.choose(here, mine, 0), WARPS * WORD), sub * words * WORD)
                bits.or_if(here, t.add(masks, at), bit)
        utils.warpgroup_barrier()

    run(refs.experts, refs.masks, first)


def _place(refs: Refs, plan: Plan, cta: Scalar, first: Scalar) -> None:
    """The slots of this CTA's tokens, a choice a thread, and their weights."""
    (each, choices), (subs, words) = refs.slots_s.shape, refs.masks.shape
    ctas, (_, row_words) = lax.axis_size("cta"), plan.row_words

    @plgpu.inline_mgpu(arg_types=(*(REF,) * 6, SCALAR, SCALAR))
    def run(
        _: Any, experts: Any, by: Any, masks: Any, slots_s: Any, slots: Any, weights: Any,
        cta: Any, first: Any,
    ) -> None:  # fmt: skip
        (cta,), (first,), masks = t.registers(cta), t.registers(first), t.shared(masks)
        for pair, exists in bits.columns(each * choices):
            i = arith.divui(pair, t.const(choices))
            j, token = arith.subi(pair, t.times(i, choices)), t.add(cta, t.times(i, ctas))
            valid = arith.andi(exists, t.less(token, plan.rows))
            token = t.choose(valid, token, 0)
            at = t.add(t.times(token, row_words), j)
            mine = arith.subi(t.load(t.row(t.memory(experts), at, WORD)), first)
            here = t.within(mine, plan.experts)
            column = t.choose(here, mine, 0)
            before = _before(masks, column, token, subs, words)
            slot = t.choose(here, t.add(t.times(column, plan.rows), before), -1)
            bits.store_if(valid, t.add(t.shared(slots_s), t.times(pair, WORD)), slot)
            to = t.add(t.times(token, choices), j)
            bits.store_global_if(valid, t.row(t.memory(slots), to, WORD), slot)
            weight = t.load(t.row(t.memory(by), at, WORD))
            bits.store_global_if(valid, t.row(t.memory(weights), to, WORD), weight)
        utils.warpgroup_barrier()

    given = refs.experts, refs.weights, refs.masks, refs.slots_s, refs.slots, refs.weights_out
    run(*given, cta, first)


def _before(masks: Any, column: Any, token: Any, subs: int, words: int) -> Any:
    """How many tokens before this one have a bit in the column."""
    word, total = t.down(token, 5), t.const(0)
    lower = t.ptx(
        "{ .reg .b32 m; and.b32 m, $1, 31; shl.b32 m, 1, m; sub.s32 $0, m, 1; }", "=r,r", token,
        outputs=1,
    )  # fmt: skip
    for sub in range(subs):
        for warp, found in enumerate(bits.words(masks, column, sub, words)):
            number = sub * WARPS + warp
            mask = t.choose(t.less(number, word), -1, t.choose(t.less(word, number), 0, lower))
            total = t.add(total, bits.ones(arith.andi(found, mask)))
    return total


def _put_counts(masks: Any, counts: Any) -> None:
    subs, words = masks.shape

    @plgpu.inline_mgpu(arg_types=(REF, REF))
    def run(_: Any, masks: Any, counts: Any) -> None:
        for column, there in bits.columns(words // WARPS):
            total = t.const(0)
            for sub in range(subs):
                for word in bits.words(t.shared(masks), column, sub, words):
                    total = t.add(total, bits.ones(word))
            bits.store_global_if(there, t.row(t.memory(counts), column, WORD), total)

    run(masks, counts)


def _four(address: Any, at: int) -> list[Any]:
    """16 bytes, past L1."""
    text = f"ld.global.cg.v4.b32 {{$0, $1, $2, $3}}, [$4 + {at}];"
    return t.ptx(text, "=r,=r,=r,=r,l", address, outputs=4)
