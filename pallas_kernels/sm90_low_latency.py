"""Dispatch for decode on Hopper: few tokens, cast to FP8 on their way over NVLink.

Here the rank that has a token pushes it, which takes one trip over the link and not two, to a place
that needs no counting: token t of rank s is row s * T + t on every rank that has an expert of it.
What the receivers have to know of a token, its experts and weights, goes to all of them beside it,
so that no other exchange comes before. All tokens of a CTA are fetched at once; none waits.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE, tile_scale
from pallas_kernels.sm90_peers import Ranks
from pallas_kernels.sm90_quantize import rows_layout
from pallas_kernels.sm90_tile import keep_row_major

CTAS = 64
SMEM, MOST_BARRIERS = 192 << 10, 32
WORDS = 4  # in the 16 bytes that a bulk copy moves
TILES = 8  # the layout's unit: two a warp
INSIDE = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # a bulk copy; else a tensor map, of one device
Refs = types.SimpleNamespace
Scalar = Any


@lowered_once
def cast_dispatch(
    x: jax.Array, ranks: jax.Array, about: jax.Array, *, peers: Ranks, ctas: int = CTAS,
    power_of_two: bool = False, interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(q [R * T, d], scale [R * T, d / 128], about [R * T, n]) of all ranks' tokens.

    q and scale are `quantize_tiles` of x [T, d], bfloat16 with d a multiple of 128, in the rows
    that ranks [T, R] (bool or int32) sends here; others stay unwritten. about [T, n] is int32.
    """
    *_, tokens, width = x.shape
    tiles, words = width // TILE, about.shape[-1]
    about = _padded(about)
    row = (peers.count * tokens,)
    out = [
        jax.ShapeDtypeStruct((*peers.stacked, *row, tiles, TILE), E4M3),
        jax.ShapeDtypeStruct((*peers.stacked, *row, _up(tiles, WORDS)), jnp.float32),
        jax.ShapeDtypeStruct((*peers.stacked, *row, about.shape[-1]), jnp.int32),
    ]
    held = _up(tiles, TILES)
    most = max(1, min(MOST_BARRIERS, SMEM // (held * TILE * 3)))  # bytes: 2 of x, 1 of q
    ctas = max(min(ctas, tokens), ceil_div(tokens, most))
    each = ceil_div(tokens, ctas)
    names = ["x", "ranks", "about", "q", "scale", "about_out"]

    def kernel(*refs: Any, done: Any = None, **memory: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        if interpret is None:
            keep_row_major(memory["x_s"], memory["q_s"])
        _push(Refs(**named, **memory), peers, power_of_two)
        peers.finish(done)

    q, scale, about = plgpu.kernel(
        kernel, out_type=out, **peers.grid(ctas), kernel_name="cast_dispatch",
        scratch_types=dict(
            x_s=plgpu.SMEM((each, held, TILE), x.dtype), q_s=plgpu.SMEM((each, held, TILE), E4M3),
            scale_s=plgpu.SMEM((each, held), jnp.float32),
            about_s=plgpu.SMEM((each, about.shape[-1]), jnp.int32),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=each), **peers.semaphores(),
        ),
        interpret=interpret, compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x.reshape(*x.shape[:-1], tiles, TILE), ranks.astype(jnp.int32), about)  # fmt: skip
    return q.reshape(*q.shape[:-2], width), scale[..., :tiles], about[..., :words]


def _push(refs: Refs, peers: Ranks, power_of_two: bool) -> None:
    """Every token of this CTA: fetched, cast, and stored on the ranks that want it."""
    x, tiles = peers.own(refs.x), refs.x.shape[-2]
    cta, ctas, tokens = lax.axis_index("cta"), lax.axis_size("cta"), x.shape[0]
    own = lax.div(tokens - cta + (ctas - 1), jnp.int32(ctas))

    @pl.loop(0, own)
    def _(i: Scalar) -> None:
        token = cta + i * ctas
        to = refs.x_s.at[i, pl.ds(0, tiles)]
        plgpu.copy_gmem_to_smem(x.at[token], to, refs.full.at[i], oob_mode=INSIDE)
        about = peers.own(refs.about).at[token]
        plgpu.copy_gmem_to_smem(about, refs.about_s.at[i], refs.full.at[i], oob_mode=INSIDE)

    @pl.loop(0, own)
    def _(i: Scalar) -> None:
        plgpu.barrier_wait(refs.full.at[i])
        _cast(refs, i, power_of_two)
        plgpu.commit_smem()
        _send(refs, peers, i, cta + i * ctas)

    plgpu.wait_smem_to_gmem(0)


def _cast(refs: Refs, i: Scalar, power_of_two: bool) -> None:
    layout = rows_layout(refs.x_s.dtype)
    values = plgpu.load(refs.x_s.at[i], layout=layout, optimized=False)
    amax = jnp.max(jnp.abs(values), axis=1).astype(jnp.float32)
    scale, inverse = tile_scale(amax, power_of_two)
    refs.scale_s.at[i][...] = scale
    scaled = values.astype(jnp.float32) * lax.broadcast_in_dim(inverse, values.shape, [0])
    refs.q_s.at[i][...] = scaled.astype(E4M3)


def _send(refs: Refs, peers: Ranks, i: Scalar, token: Scalar) -> None:
    """One group of stores: some always go, for those of an empty one nobody would wait."""
    ranks, me = peers.own(refs.ranks), peers.rank()
    tokens, tiles = ranks.shape[0], refs.x.shape[-2]
    row = me * tokens + token
    for step in range(1, peers.count + 1):  # others than this rank first, not all the same
        rank = lax.rem(me + step, jnp.int32(peers.count))

        @pl.when(ranks[token, rank] != 0)
        def _(rank: Scalar = rank) -> None:
            scale = refs.scale_s.at[i, pl.ds(0, refs.scale.shape[-1])]
            _store(refs.q_s.at[i, pl.ds(0, tiles)], peers.of(refs.q, rank).at[row])
            _store(scale, peers.of(refs.scale, rank).at[row])

        _store(refs.about_s.at[i], peers.of(refs.about_out, rank).at[row])
    plgpu.commit_smem_to_gmem_group()


def _store(row: Any, out: Any) -> None:
    plgpu.copy_smem_to_gmem(row, out, commit_group=False)


def _padded(about: jax.Array) -> jax.Array:
    more = -about.shape[-1] % WORDS
    return jnp.pad(about, [(0, 0)] * (about.ndim - 1) + [(0, more)]) if more else about


def _up(size: int, step: int) -> int:
    return ceil_div(size, step) * step
