"""Tokens of all ranks into the rows of this rank's experts, on Hopper over NVLink.

The rank that wants rows pulls them: a persistent CTA of one warpgroup fetches a token's row from
its rank with one bulk copy into a ring of shared memory and stores it from there to all of its
slots. So a row crosses the link once, whatever number of experts here want it, and comes to lie in
expert order, as grouped products read it, without a second pass. The tokens are divided evenly by
their number on the device. It takes few CTAs, so that the other SMs of the GPU stay free.

Scales travel beside their row as a row of their own: written K-block-major, word by word, they
take longer than the rows themselves (four ranks on one H200: 820 us against 386 as rows).
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
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.in_place import unfused
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_peers import Ranks

SCALE_STEP = 4  # scales in the 16 bytes that bulk copies move
CTAS = 64
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
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
    """`dispatch` of e4m3 q [T, d] and of its float32 scale [T, tiles]."""
    tiles = scale.shape[-1]
    q, scale = _pull(
        "dispatch_quantized", q, scale, slots, tokens, count, rows, peers, ctas, ring, interpret
    )  # fmt: skip
    return q, scale[..., :tiles]


def _pull(
    name: str, x: jax.Array, scale: jax.Array | None, slots: jax.Array, tokens: jax.Array,
    count: jax.Array, rows: int, peers: Ranks, ctas: int, ring: Ring, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    width, stages = x.shape[-1], ring.fitting(x.shape[-1] * x.dtype.itemsize)
    operands = dict(x=x, slots=slots, tokens=tokens, count=count)
    out = dict(out=jax.ShapeDtypeStruct((*peers.stacked, rows, width), x.dtype))
    scratch = dict(x_s=plgpu.SMEM((stages, width), x.dtype))
    if scale is not None:
        scale = operands["scale"] = _padded(scale)
        shape = (*peers.stacked, rows, scale.shape[-1])
        out["scale_out"] = jax.ShapeDtypeStruct(shape, scale.dtype)
        scratch["scale_s"] = plgpu.SMEM((stages, scale.shape[-1]), scale.dtype)

    def kernel(*refs: Any, done: Any = None, **memory: Any) -> None:
        named = dict(zip((*operands, *out), refs, strict=True))
        _walk(Refs(**named, **memory), peers)
        peers.finish(done)

    full = plgpu.Barrier(num_arrivals=1 + (scale is not None), num_barriers=stages)
    launch = plgpu.kernel(
        kernel, out_type=list(out.values()), **peers.grid(min(ctas, slots.shape[-2])),
        scratch_types=dict(**scratch, full=full, **peers.semaphores()), kernel_name=name,
        interpret=interpret, compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )  # fmt: skip
    return unfused(launch)(*operands.values())


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
    pairs = [(refs.x_s.at[stage], out)]
    if hasattr(refs, "scale"):
        pairs.append((refs.scale_s.at[stage], peers.own(refs.scale_out)))
    for slot, inside in zip(slots, named, strict=True):
        pl.when(inside)(functools.partial(_store_all, pairs, slot))
    # An empty group is complete at once and would be counted in place of an older one.
    some = functools.reduce(jnp.logical_or, named)
    pl.when(some)(plgpu.commit_smem_to_gmem_group)
    pl.when(jnp.logical_not(some))(functools.partial(plgpu.wait_smem_to_gmem, 0))


def _store_all(pairs: Sequence[tuple[Any, Any]], slot: Scalar) -> None:
    for row, out in pairs:
        plgpu.copy_smem_to_gmem(row, out.at[slot], commit_group=False)
