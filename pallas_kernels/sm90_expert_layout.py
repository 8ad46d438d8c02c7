"""Rows of all ranks' tokens on this one, counted by one kernel on Hopper.

A CTA has up to `MOST` times 128 tokens of one rank, whose choices it reads over NVLink. A word of
shared memory has a bit for each token of a warp: that of an expert's words tells a token how many
before it chose the same one. What CTAs have of each expert goes through global memory, for which
they wait for one another; all of them run at once.
"""

from __future__ import annotations

import functools
import types
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
from pallas_kernels.checks import ceil_div
from pallas_kernels.in_place import unfused
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import Ranks
from pallas_kernels.sm90_token_bits import THREADS, WARPS, WORD

MOST = 32  # tokens of a thread: their choices stay in shared memory
CTAS = 128  # all of them on the card at once
AT_ONCE = 16  # loads under way
SCALAR, REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()
Refs = types.SimpleNamespace
Scalar = Any


def fits(tokens: int, choices: int, experts: int, ranks: int) -> bool:
    """Whether the kernel takes T tokens a rank: whole CTAs of them, and room for what they need."""
    each = _each(tokens, ranks)
    small = choices * each * THREADS + (experts + 1) * WARPS * each <= 48 << 10
    return tokens % (THREADS * each) == 0 and each <= MOST and small


def _each(tokens: int, ranks: int) -> int:
    """Tokens of a thread, a power of two."""
    asked = ceil_div(tokens * ranks, THREADS * CTAS)
    return 1 << max(0, asked - 1).bit_length()


@lowered_once
def layout(
    experts: jax.Array, *, count: int, peers: Ranks
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of all ranks' choices [T, k] slots [R * T, k], sizes [count], tokens [R * T], how many count.

    A rank has `count` experts, the first rank the first ones; the numbers mean what they do in
    `expert_layout`. Behind their number tokens are unwritten.
    """
    tokens, choices = experts.shape[-2:]
    each, total = _each(tokens, peers.count), tokens * peers.count
    ctas = total // (THREADS * each)
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    out = [(total, choices), (count,), (total,), (1,), (ctas, count + 1)]

    def kernel(*refs: Any, done: Any = None, **scratch: Any) -> None:
        names = "experts", "slots", "sizes", "tokens", "number", "counts"
        barrier = pl.get_global(plgpu.SemaphoreType.REGULAR((peers.count,)))
        _run(Refs(**dict(zip(names, refs, strict=True)), **scratch, barrier=barrier), peers, done)

    launch = plgpu.kernel(
        kernel, out_type=[kind((*peers.stacked, *shape)) for shape in out], **peers.grid(ctas),
        scratch_types=dict(
            masks=plgpu.SMEM((each, (count + 1) * WARPS), jnp.int32),
            chosen=plgpu.SMEM((each * choices, THREADS), jnp.int32),
            base=plgpu.SMEM((2, count + 1), jnp.int32), **peers.semaphores(),
        ),
        kernel_name="expert_layout",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    found = unfused(launch)(experts)
    return found[0], found[1], found[2], found[3]


def _run(refs: Refs, peers: Ranks, done: Any) -> None:
    cta, me = lax.axis_index("cta"), peers.rank()
    tokens = peers.own(refs.experts).shape[0]
    each, count = refs.masks.shape[0], refs.base.shape[1] - 1
    first = cta * (THREADS * each)
    rank = lax.div(first, jnp.int32(tokens))
    _read(refs, peers.of(refs.experts, rank), lax.rem(first, jnp.int32(tokens)), me * count)
    peers.arrive(done)
    _count(refs, peers.own(refs.counts), cta)
    _wait_for_all(refs, peers, me)
    _add_up(refs, peers.own(refs.counts), cta)

    @pl.when(cta == 0)
    def _() -> None:
        _put_sizes(refs, peers.own(refs.sizes), peers.own(refs.number))

    _put_slots(refs, peers.own(refs.slots), peers.own(refs.tokens), first)
    peers.wait(done)


def _wait_for_all(refs: Refs, peers: Ranks, me: Scalar) -> None:
    """For the CTAs of this rank."""
    place = me if len(peers.stacked) else jnp.int32(0)
    pl.semaphore_signal(refs.barrier.at[place])
    pl.semaphore_wait(refs.barrier.at[place], lax.axis_size("cta"), decrement=False)


def _read(refs: Refs, experts: Any, first: Scalar, lowest: Scalar) -> None:
    """Choices less `lowest` into `chosen`, and a bit for every token in its experts' masks."""
    (each, words), choices = refs.masks.shape, experts.shape[1]
    count = words // WARPS - 1

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, SCALAR, SCALAR))
    def run(_: Any, experts: Any, masks: Any, chosen: Any, first: Any, lowest: Any) -> None:
        (first,), (lowest,) = t.registers(first), t.registers(lowest)
        warp, lane = t.thread()
        number = t.add(t.times(warp, 32), lane)
        masks, chosen = t.shared(masks), t.add(t.shared(chosen), t.times(number, WORD))
        for i in range(0, each * words, THREADS):
            at = t.add(number, i)
            bits.store_if(t.less(at, each * words), t.add(masks, t.times(at, WORD)), t.const(0))
        utils.warpgroup_barrier()
        bit = t.ptx("shl.b32 $0, 1, $1;", "=r,r", lane, outputs=1)
        for sub in range(each):
            token = t.add(t.add(first, sub * THREADS), number)
            row = t.row(t.memory(experts), token, choices * WORD)
            own = t.add(masks, t.times(t.add(warp, sub * words), WORD))
            some = t.const(0)
            for j, expert in enumerate([t.load(row, WORD * j) for j in range(choices)]):
                mine = arith.subi(expert, lowest)
                here = arith.andi(t.within(mine, count), t.less(-1, expert))
                t.ptx(
                    f"st.shared.b32 [$0 + {(sub * choices + j) * THREADS * WORD}], $1;", "r,r",
                    chosen, t.choose(here, mine, -1),
                )  # fmt: skip
                bits.or_if(here, t.add(own, t.times(t.choose(here, mine, 0), WARPS * WORD)), bit)
                some = t.choose(here, 1, some)
            bits.or_if(t.less(0, some), t.add(own, count * WARPS * WORD), bit)
        utils.warpgroup_barrier()

    run(experts, refs.masks, refs.chosen, first, lowest)


def _count(refs: Refs, counts: Any, cta: Scalar) -> None:
    """counts[cta]: of each expert the tokens of this CTA, and last of any."""
    each, words = refs.masks.shape
    columns = words // WARPS

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR))
    def run(_: Any, masks: Any, counts: Any, cta: Any) -> None:
        for column, there in bits.columns(columns):
            total = t.const(0)
            for sub in range(each):
                for word in bits.words(t.shared(masks), column, sub, words):
                    total = t.add(total, bits.ones(word))
            to = t.row(t.row(t.memory(counts), t.registers(cta)[0], columns * WORD), column, WORD)
            bits.store_global_if(there, to, total)
        utils.warpgroup_barrier()

    run(refs.masks, counts, cta)


def _add_up(refs: Refs, counts: Any, cta: Scalar) -> None:
    """base[0]: of each expert its first row of this CTA's; base[1]: its tokens of all CTAs."""
    ctas, columns = counts.shape

    @plgpu.inline_mgpu(arg_types=(REF, REF, SCALAR))
    def run(_: Any, counts: Any, base: Any, cta: Any) -> None:
        (cta,), base = t.registers(cta), t.shared(base)
        befores = []
        for column, there in bits.columns(columns):
            total, before = t.const(0), t.const(0)
            row = t.row(t.memory(counts), column, WORD)
            for start in range(0, ctas, AT_ONCE):
                numbers = range(start, min(start + AT_ONCE, ctas))
                # Past L1, in which what other CTAs wrote need not appear.
                found = [
                    t.ptx(f"ld.global.cg.b32 $0, [$1 + {i * columns * WORD}];", "=r,l", row,
                          outputs=1)
                    for i in numbers
                ]  # fmt: skip
                for i, value in zip(numbers, found, strict=True):
                    total = t.add(total, value)
                    before = t.choose(t.less(i, cta), t.add(before, value), before)
            bits.store_if(there, t.add(base, t.times(t.add(column, columns), WORD)), total)
            befores.append((column, there, before))
        utils.warpgroup_barrier()
        for column, there, before in befores:
            start = before
            for other in range(columns - 2):  # those before an expert; the last column is none
                size = t.ptx(f"ld.shared.b32 $0, [$1 + {(columns + other) * WORD}];", "=r,r", base,
                             outputs=1)  # fmt: skip
                behind = arith.andi(t.less(other, column), t.less(column, columns - 1))
                start = t.choose(behind, t.add(start, size), start)
            bits.store_if(there, t.add(base, t.times(column, WORD)), start)
        utils.warpgroup_barrier()

    run(counts, refs.base, cta)


def _put_sizes(refs: Refs, sizes: Any, number: Any) -> None:
    columns = refs.base.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF))
    def run(_: Any, base: Any, sizes: Any, number: Any) -> None:
        for column, there in bits.columns(columns):
            at = t.add(t.shared(base), t.times(t.add(column, columns), WORD))
            total = t.ptx("ld.shared.b32 $0, [$1];", "=r,r", at, outputs=1)
            expert = t.less(column, columns - 1)
            bits.store_global_if(expert, t.row(t.memory(sizes), column, WORD), total)
            last = arith.andi(there, t.less(columns - 2, column))
            bits.store_global_if(last, t.memory(number), total)

    run(refs.base, sizes, number)


def _put_slots(refs: Refs, slots: Any, tokens: Any, first: Scalar) -> None:
    (each, words), choices = refs.masks.shape, slots.shape[1]

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, REF, SCALAR))
    def run(
        _: Any, masks: Any, chosen: Any, base: Any, slots: Any, tokens: Any, first: Any
    ) -> None:
        (first,), (warp, lane) = t.registers(first), t.thread()
        number = t.add(t.times(warp, 32), lane)
        chosen = t.add(t.shared(chosen), t.times(number, WORD))
        below = _below(warp, lane)
        masks, base = t.shared(masks), t.shared(base)

        def place(column: Any, sub: int) -> Any:
            at = t.ptx("ld.shared.b32 $0, [$1];", "=r,r", t.add(base, t.times(column, WORD)),
                       outputs=1)  # fmt: skip
            for earlier in range(sub):
                for word in bits.words(masks, column, earlier, words):
                    at = t.add(at, bits.ones(word))
            for word, mask in zip(bits.words(masks, column, sub, words), below, strict=True):
                at = t.add(at, bits.ones(arith.andi(word, mask)))
            return at

        for sub in range(each):
            token, some = t.add(t.add(first, sub * THREADS), number), t.const(0)
            row = t.row(t.memory(slots), token, choices * WORD)
            for j in range(choices):
                offset = (sub * choices + j) * THREADS * WORD
                mine = t.ptx(f"ld.shared.b32 $0, [$1 + {offset}];", "=r,r", chosen, outputs=1)
                here = t.less(-1, mine)
                slot = t.choose(here, place(t.choose(here, mine, 0), sub), -1)
                t.ptx(f"st.global.b32 [$0 + {WORD * j}], $1;", "l,r", row, slot)
                some = t.choose(here, 1, some)
            to = place(t.const(words // WARPS - 1), sub)
            bits.store_global_if(t.less(0, some), t.row(t.memory(tokens), to, WORD), token)

    run(refs.masks, refs.chosen, refs.base, slots, tokens, first)


def _below(warp: Any, lane: Any) -> list[Any]:
    """Of each warp the bits of tokens before this thread's."""
    own = t.ptx("mov.b32 $0, %lanemask_lt;", "=r", outputs=1)
    return [t.choose(t.less(i, warp), -1, t.choose(t.less(warp, i), 0, own)) for i in range(WARPS)]
