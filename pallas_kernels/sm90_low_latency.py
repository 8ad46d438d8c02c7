"""The exchange of a decoding step on Hopper: what its inbox holds, and tokens on their way there.

A rank casts its tokens to FP8 and pushes them, which takes one trip over the link and not two, to
places that need no counting: token t of rank s is row s * T + t of the inbox of every rank that has
an expert of it. Its experts and weights go to all ranks. `sm90_low_latency_receive` gives tokens
their places there, `sm90_low_latency_combine` brings sums back.

The inbox lives as long as the program, changed in place, so that nothing is allocated, zeroed or
agreed on in a round. Nor do kernels meet before they start, as others that name peers do. They tell
each other by counters, which only grow: a CTA that has stored all its tokens, completely, adds 1 to
`tokens_in` of every rank, also of those to which it sent none; senders of sums do so with `sums_in`
of their chunk. Receivers wait for as many as belong to the rounds so far. `turns` count these on
the device: 0 the rounds whose sums have come, 1 those whose tokens have; the receiver of tokens
reads the first and writes the second, that of sums the other way round.

Why nothing is overwritten too early: a rank sends tokens of the next round after it has received
all sums of this one. Those were sent by ranks that had received, and moved out, all tokens of this
round. In the same way sums are sent after all tokens of their round have come, from ranks that had
added up the sums of the round before. So dispatch and combine must take turns, on each inbox. All
kernels of an inbox take `turns`, which keeps XLA to their order. The first round is not ahead of
anybody's zeros either: opening an inbox ends with a kernel for which all devices wait.
"""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE, tile_scale
from pallas_kernels.sm90_peers import Ranks, count_up
from pallas_kernels.sm90_quantize import rows_layout
from pallas_kernels.sm90_tile import keep_row_major

CTAS = 128
SMEM, MOST_BARRIERS = 192 << 10, 32
WORDS = 4  # in the 16 bytes of which a bulk copy moves multiples
TILES = 8  # the layout's unit: two a warp
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
UNMET = plgpu.CompilerParams(unsafe_no_auto_barriers=True, skip_device_barrier=True)
Refs = types.SimpleNamespace
Scalar = Any


class Plan(NamedTuple):
    """What an inbox is for: T tokens [d] of each rank, k choices, of which a rank has `experts`.

    `ctas` send tokens; sums are counted in chunks of `chunk` tokens.
    """

    peers: Ranks
    tokens: int
    width: int
    choices: int
    experts: int
    ctas: int
    chunk: int

    @property
    def rows(self) -> int:
        """Tokens of all ranks."""
        return self.peers.count * self.tokens

    @property
    def tiles(self) -> int:
        return self.width // TILE

    @property
    def row_words(self) -> tuple[int, int]:
        """Of a token's scales, and of its experts or weights, in whole bulk copies."""
        return _up(self.tiles, WORDS), _up(self.choices, WORDS)

    @property
    def senders(self) -> int:
        """CTAs of a rank that send tokens: enough for these to have room."""
        held = _up(self.tiles, TILES) * TILE * 3  # bytes: 2 of x, 1 of q
        most = max(1, min(MOST_BARRIERS, SMEM // held))
        return max(min(self.ctas, self.tokens), ceil_div(self.tokens, most))


class Buffers(NamedTuple):
    """Mutable arrays of a rank; others write to all but the last two."""

    q: Any
    """e4m3 [R * T, d / 128, 128]."""
    scale: Any
    """float32 [R * T, d / 128], padded as the next two are."""
    experts: Any
    """int32 [R * T, k]."""
    weights: Any
    """float32 [R * T, k]."""
    staging: Any
    """bfloat16 [R, T, d]: sums for the own tokens, by rank."""
    tokens_in: Any
    """int32 [1]."""
    sums_in: Any
    """int32 [chunks]."""
    turns: Any
    """int32 [2]."""
    rank: Any
    """int32 [1]: which it is, as a kernel that asked would be one that names peers."""

    @property
    def incoming(self) -> tuple[Any, ...]:
        """What tokens are received in, and the turns."""
        return self.q, self.scale, self.experts, self.weights, self.tokens_in, self.turns


INCOMING = "q", "scale", "experts", "weights", "tokens_in", "turns"


def shapes(plan: Plan) -> Buffers:
    tiles, words = plan.row_words
    sums = plan.peers.count, plan.tokens, plan.width

    def of(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*plan.peers.stacked, *shape), dtype)

    return Buffers(
        of((plan.rows, plan.tiles, TILE), E4M3), of((plan.rows, tiles), jnp.float32),
        of((plan.rows, words), jnp.int32), of((plan.rows, words), jnp.float32),
        of(sums, jnp.bfloat16), of((1,), jnp.int32),
        of((ceil_div(plan.tokens, plan.chunk),), jnp.int32), of((2,), jnp.int32),
        of((1,), jnp.int32),
    )  # fmt: skip


def open_buffers(plan: Plan) -> Buffers:
    """Of zeros, for the rest of the program that is being traced."""
    zeros = Buffers(*(jnp.zeros(x.shape, x.dtype) for x in shapes(plan)))
    found = Buffers(*map(jax.new_ref, zeros._replace(rank=own_rank(plan))))
    if plan.peers.semaphores():
        _meet(found, plan)
    return found


def own_rank(plan: Plan) -> jax.Array:
    """[1], or of all ranks on one card."""
    if plan.peers.stacked:
        return jnp.arange(plan.peers.count, dtype=jnp.int32)[:, None]
    return plan.peers.rank()[None]


def _meet(buffers: Buffers, plan: Plan) -> None:
    """All ranks have come this far, with their zeros, when any of them goes on."""

    def kernel(*refs: Any, done: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def run(_: Any, *refs: Any) -> None:
            """Nothing: for XLA they are written here, so that it makes no copies afterwards."""

        run(*refs)
        plan.peers.finish(done)

    plgpu.kernel(
        kernel, **plan.peers.grid(1), scratch_types=plan.peers.semaphores(),
        kernel_name="open_inbox",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*buffers)  # fmt: skip


@lowered_once
def dispatch_send(
    x: jax.Array, experts: jax.Array, weights: jax.Array, buffers: Buffers, *, plan: Plan,
    power_of_two: bool = False, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """Tokens to all inboxes, and ranks int32 [T, R], which of them took a token.

    x [T, d] is bfloat16, experts int32 [T, k], weights float32 [T, k]; what arrives are experts and
    weights, and `quantize_tiles` of x.
    """
    more = [(0, 0)] * (experts.ndim - 1) + [(0, -plan.choices % WORDS)]
    if more[-1][1]:
        experts, weights = jnp.pad(experts, more, constant_values=-1), jnp.pad(weights, more)
    (_, words), held = plan.row_words, _up(plan.tiles, TILES)
    each = ceil_div(plan.tokens, plan.senders)
    names = ["x", "chosen", "by", *INCOMING, "ranks"]

    def kernel(*refs: Any, **memory: Any) -> None:
        named = Refs(**dict(zip(names, refs, strict=True)), **memory)
        if interpret is None:
            keep_row_major(memory["x_s"], memory["q_s"])
        _push(named, plan, power_of_two)
        if interpret is None:
            _tell(named.tokens_in, plan.peers)

    tiled = x.reshape(*x.shape[:-1], plan.tiles, TILE)
    given = lax.optimization_barrier((tiled, experts, weights))  # see `in_place`
    ranks = jax.ShapeDtypeStruct((*plan.peers.stacked, plan.tokens, plan.peers.count), jnp.int32)
    found = plgpu.kernel(
        kernel, out_type=ranks, **plan.peers.grid(plan.senders), kernel_name="dispatch_send",
        scratch_types=dict(
            x_s=plgpu.SMEM((each, held, TILE), x.dtype), q_s=plgpu.SMEM((each, held, TILE), E4M3),
            scale_s=plgpu.SMEM((each, held), jnp.float32),
            chosen_s=plgpu.SMEM((each, words), jnp.int32),
            by_s=plgpu.SMEM((each, words), jnp.float32),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=each),
        ),
        interpret=interpret, compiler_params=UNMET,
    )(*given, *buffers.incoming)  # fmt: skip
    return lax.optimization_barrier(found)


def _push(refs: Refs, plan: Plan, power_of_two: bool) -> None:
    """Every token of this CTA: fetched, cast, and stored on the ranks that want it."""
    operands = [plan.peers.own(ref) for ref in (refs.x, refs.chosen, refs.by)]
    memory = refs.x_s, refs.chosen_s, refs.by_s
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
    own = lax.div(plan.tokens - cta + (ctas - 1), jnp.int32(ctas))

    @pl.loop(0, own)
    def _(i: Scalar) -> None:
        for ref, to in zip(operands, memory, strict=True):
            row, at = ref.at[cta + i * ctas], to.at[i]
            at = to.at[i, pl.ds(0, plan.tiles)] if to is refs.x_s else at
            plgpu.copy_gmem_to_smem(row, at, refs.full.at[i], oob_mode=INSIDE)

    @pl.loop(0, own)
    def _(i: Scalar) -> None:
        plgpu.barrier_wait(refs.full.at[i])
        _cast(refs, i, power_of_two)
        plgpu.commit_smem()
        _send(refs, plan, i, cta + i * ctas)

    plgpu.wait_smem_to_gmem(0)


def _cast(refs: Refs, i: Scalar, power_of_two: bool) -> None:
    layout = rows_layout(refs.x_s.dtype)
    values = plgpu.load(refs.x_s.at[i], layout=layout, optimized=False)
    amax = jnp.max(jnp.abs(values), axis=1).astype(jnp.float32)
    scale, inverse = tile_scale(amax, power_of_two)
    refs.scale_s.at[i][...] = scale
    scaled = values.astype(jnp.float32) * lax.broadcast_in_dim(inverse, values.shape, [0])
    refs.q_s.at[i][...] = scaled.astype(E4M3)


def _send(refs: Refs, plan: Plan, i: Scalar, token: Scalar) -> None:
    """One group of stores: some always go, for those of an empty one nobody would wait."""
    peers, me = plan.peers, plan.peers.rank()
    row, ranks = me * plan.tokens + token, peers.own(refs.ranks)
    chosen = [refs.chosen_s[i, j] for j in range(plan.choices)]
    for step in range(1, peers.count + 1):  # others than this rank first, not all the same
        rank = lax.rem(me + step, jnp.int32(peers.count))
        first = rank * plan.experts
        wanted = jnp.bool(False)
        for expert in chosen:
            wanted |= (expert >= first) & (expert < first + plan.experts)
        ranks[token, rank] = wanted.astype(jnp.int32)

        @pl.when(wanted)
        def _(rank: Scalar = rank) -> None:
            scale = refs.scale_s.at[i, pl.ds(0, refs.scale.shape[-1])]
            _store(refs.q_s.at[i, pl.ds(0, plan.tiles)], peers.of(refs.q, rank).at[row])
            _store(scale, peers.of(refs.scale, rank).at[row])

        _store(refs.chosen_s.at[i], peers.of(refs.experts, rank).at[row])
        _store(refs.by_s.at[i], peers.of(refs.weights, rank).at[row])
    plgpu.commit_smem_to_gmem_group()


def _store(row: Any, out: Any) -> None:
    plgpu.copy_smem_to_gmem(row, out, commit_group=False)


def _tell(counter: Any, peers: Ranks) -> None:
    """All ranks, of this CTA's stores."""
    me, count = peers.rank(), jnp.int32(peers.count)

    def tell() -> None:
        ranks = [lax.rem(me + step, count) for step in range(1, peers.count + 1)]
        count_up(*(peers.of(counter, rank).at[pl.ds(0, 1)] for rank in ranks))

    plgpu.warp_map(lambda warp: pl.when(warp == 0)(tell))


def _up(size: int, step: int) -> int:
    return ceil_div(size, step) * step
