"""Tokens of all ranks into the rows of this rank's experts, on Hopper over NVLink.

The rank that wants rows pulls them: a persistent CTA of one warpgroup fetches a token's row from
its rank with one bulk copy into a ring of shared memory and stores it from there to all of its
slots. So a row crosses the link once, whatever number of experts here want it, and comes to lie in
expert order, as grouped products read it, without a second pass. The tokens are divided evenly by
their number on the device. 16 to 64 CTAs keep the links busy; the others of the GPU stay free.

Scales come beside their row. Threads write them K-block-major, single words while copies run.
"""

from __future__ import annotations

import functools
import types
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
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import Ranks

THREADS, SCALE_STEP = 128, 4  # the latter: scales in the 16 bytes that bulk copies move
CTAS = 64
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
SCALAR, REF = plgpu.Layout.WG_SPLAT, plgpu.RefType()
Refs = types.SimpleNamespace
Scalar = Any


class Ring(NamedTuple):
    """Shared memory of a CTA's rows in bytes, and how many rows at most."""

    bytes: int = 192 << 10
    stages: int = 12

    def fitting(self, row: int) -> int:
        """Stages for rows of so many bytes, 2 at least."""
        return max(2, min(self.stages, self.bytes // row))


RING = Ring()


@lowered_once
def dispatch(
    x: jax.Array, slots: jax.Array, tokens: jax.Array, count: jax.Array, *, rows: int,
    peers: Ranks, ctas: int = CTAS, ring: Ring = RING, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out [rows, w] with out[slots[s * T + t, j]] = x [T, w] of rank s, row t.

    For the tokens s * T + t among the first count[0] of `tokens`; slots outside of [0, rows) are
    left out, and rows that none names unwritten. A row of x is a multiple of 16 bytes.
    """
    return _pull(
        "dispatch_rows", x, None, slots, tokens, count, rows, peers, ctas, ring, interpret
    )[0]


@lowered_once
def dispatch_quantized(
    q: jax.Array, scale: jax.Array, slots: jax.Array, tokens: jax.Array, count: jax.Array, *,
    rows: int, peers: Ranks, ctas: int = CTAS, ring: Ring = RING, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`dispatch` of e4m3 q [T, d] and of float32 scale [T, tiles], which comes K-block-major."""
    q, scale = _pull(
        "dispatch_quantized", q, scale, slots, tokens, count, rows, peers, ctas, ring, interpret
    )  # fmt: skip
    return q, jnp.swapaxes(scale, -1, -2)


def _pull(
    name: str, x: jax.Array, scale: jax.Array | None, slots: jax.Array, tokens: jax.Array,
    count: jax.Array, rows: int, peers: Ranks, ctas: int, ring: Ring, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    width, stages = x.shape[-1], ring.fitting(x.shape[-1] * x.dtype.itemsize)
    operands = dict(x=x, slots=slots, tokens=tokens, count=count)
    out = dict(out=jax.ShapeDtypeStruct((*peers.stacked, rows, width), x.dtype))
    scratch = dict(x_s=plgpu.SMEM((stages, width), x.dtype))
    if scale is not None:
        tiles = scale.shape[-1]
        operands["scale"] = _padded(scale)
        shape = (*peers.stacked, tiles, rows)
        out["scale_out"] = jax.ShapeDtypeStruct(shape, scale.dtype)
        scratch["scale_s"] = plgpu.SMEM(
            (stages, ceil_div(tiles, SCALE_STEP) * SCALE_STEP), scale.dtype
        )

    def kernel(*refs: Any, done: Any = None, **memory: Any) -> None:
        named = dict(zip((*operands, *out), refs, strict=True))
        _walk(Refs(**named, **memory, on_device=interpret is None), peers)
        peers.finish(done)

    full = plgpu.Barrier(num_arrivals=1 + (scale is not None), num_barriers=stages)
    return plgpu.kernel(
        kernel, out_type=list(out.values()), **peers.grid(min(ctas, slots.shape[-2])),
        scratch_types=dict(**scratch, full=full, **peers.semaphores()), kernel_name=name,
        interpret=interpret, compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())  # fmt: skip


def _padded(scale: jax.Array) -> jax.Array:
    """With columns up to a multiple of what a bulk copy moves."""
    more = -scale.shape[-1] % SCALE_STEP
    return jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, more)]) if more else scale


def _walk(refs: Refs, peers: Ranks) -> None:
    """Fetches this CTA's share of the tokens, half a ring ahead of what it stores."""
    slots, tokens = peers.own(refs.slots), peers.own(refs.tokens)
    total, choices = slots.shape
    stages = refs.x_s.shape[0]
    ahead = stages // 2
    first, own = _share(lax.clamp(0, peers.own(refs.count)[0], total))

    def token(i: Scalar) -> Scalar:
        listed = tokens[lax.min(first + i, jnp.int32(total - 1))]
        return lax.clamp(jnp.int32(0), listed, jnp.int32(total - 1))

    def targets(token: Scalar) -> tuple[Scalar, ...]:
        return tuple(slots[token, j] for j in range(choices))

    def fetch(i: Scalar, token: Scalar) -> None:
        start = functools.partial(_fetch, refs, peers, lax.rem(i, jnp.int32(stages)), token)
        pl.when(i < own)(start)

    def step(i: Scalar, carry: Any) -> Any:
        found, upcoming, distant = carry  # slots of token i, token i + 1, token i + ahead
        stage = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(refs.full.at[stage])
        _store(refs, peers, stage, found)
        plgpu.wait_smem_to_gmem(stages - ahead, wait_read_only=True)
        fetch(i + ahead, distant)
        return lax.optimization_barrier((targets(upcoming), token(i + 2), token(i + 1 + ahead)))

    for i in range(ahead):
        fetch(jnp.int32(i), token(jnp.int32(i)))
    start = targets(token(jnp.int32(0))), token(jnp.int32(1)), token(jnp.int32(ahead))
    lax.fori_loop(jnp.int32(0), own, step, start)
    plgpu.wait_smem_to_gmem(0)


def _share(total: Scalar) -> tuple[Scalar, Scalar]:
    """The first of this CTA's share of `total`, and how many it has."""
    cta, ctas = lax.axis_index("cta"), jnp.int32(lax.axis_size("cta"))
    each, over = lax.div(total, ctas), lax.rem(total, ctas)
    return cta * each + lax.min(cta, over), each + (cta < over).astype(jnp.int32)


def _fetch(refs: Refs, peers: Ranks, stage: Scalar, token: Scalar) -> None:
    height = jnp.int32(peers.own(refs.x).shape[0])
    rank, row = lax.div(token, height), lax.rem(token, height)
    full = refs.full.at[stage]
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=INSIDE)
    copy(peers.of(refs.x, rank).at[row], refs.x_s.at[stage], full)
    if hasattr(refs, "scale"):
        copy(peers.of(refs.scale, rank).at[row], refs.scale_s.at[stage], full)


def _store(refs: Refs, peers: Ranks, stage: Scalar, slots: Sequence[Scalar]) -> None:
    out = peers.own(refs.out)
    named = [(slot >= 0) & (slot < out.shape[0]) for slot in slots]
    for slot, inside in zip(slots, named, strict=True):
        store = functools.partial(_store_one, refs.x_s.at[stage], out.at[slot])
        pl.when(inside)(store)
    # An empty group is complete at once and would be counted in place of an older one.
    some = functools.reduce(jnp.logical_or, named)
    pl.when(some)(plgpu.commit_smem_to_gmem_group)
    pl.when(jnp.logical_not(some))(functools.partial(plgpu.wait_smem_to_gmem, 0))
    if hasattr(refs, "scale"):
        put = _put_scales if refs.on_device else _put_scales_one_by_one
        put(refs.scale_s.at[stage], peers.own(refs.scale_out), slots)
        plgpu.commit_smem()  # threads have read what a copy is to overwrite


def _store_one(row: Any, out: Any) -> None:
    plgpu.copy_smem_to_gmem(row, out, commit_group=False)


def _put_scales(scale_s: Any, out: Any, slots: Sequence[Scalar]) -> None:
    """out[:, slot] = scale_s for every slot: a thread has single tiles."""
    tiles, rows = out.shape

    @plgpu.inline_mgpu(arg_types=(REF, REF, *[SCALAR] * len(slots)))
    def run(_: Any, scale_s: Any, out: Any, *slots: Any) -> None:
        warp, lane = t.thread()
        thread, base, to = t.add(t.times(warp, 32), lane), t.shared(scale_s), t.memory(out)
        for first in range(0, tiles, THREADS):
            tile = t.add(thread, first)
            there = t.less(tile, tiles)
            at = t.add(base, t.times(t.choose(there, tile, 0), 4))
            word = t.ptx("ld.shared.b32 $0, [$1];", "=r,r", at, outputs=1)
            line = t.row(to, tile, 4 * rows)
            for slot in slots:
                (slot,) = t.registers(slot)
                _store_if(arith.andi(there, t.within(slot, rows)), t.row(line, slot, 4), word)

    run(scale_s, out, *slots)


def _store_if(there: Any, address: Any, word: Any) -> None:
    t.ptx(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1; }",
        "l,r,r", address, word, t.choose(there, 1, 0),
    )  # fmt: skip


def _put_scales_one_by_one(scale_s: Any, out: Any, slots: Sequence[Scalar]) -> None:
    tiles, rows = out.shape
    for slot in slots:

        @pl.when((slot >= 0) & (slot < rows))
        def _(slot: Scalar = slot) -> None:
            for tile in range(tiles):
                out[tile, slot] = scale_s[tile]
