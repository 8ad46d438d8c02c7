"""The warpgroup that gathers tokens for `sm90_mla_decode` where TMA cannot: FP8 pages, which become
bfloat16 on the way, and tokens that were chosen one by one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_mla_tokens as tokens
from pallas_kernels.sm90_mla_pages import (
    HALF,
    LATENT,
    PAGE,
    PARTS,
    ROPE,
    ROWS,
    Decode,
    Piece,
    Scalar,
    fetch_query,
    pieces,
)
from pallas_kernels.sm90_mla_plan import STEP
from pallas_kernels.sm90_registers import for_wgmma

LANES = plgpu.Layout.WG_STRIDED((STEP,), 1)


def gather_all(call: Decode, refs: Any) -> None:
    total = pieces(refs, functools.partial(_gather, call, refs))

    @pl.when(total > 0)
    def _() -> None:
        plgpu.barrier_wait(refs.q_empty)
        for i in range(2 * PARTS):
            plgpu.barrier_wait(refs.empty.at[i])


def _gather(call: Decode, refs: Any, piece: Piece, done: Scalar) -> None:
    fetch_query(call, refs, piece, done)

    def step(i: Scalar, _: None) -> None:
        number = done + i - piece.first
        places = refs.places_s.at[pl.ds(lax.rem(number, jnp.int32(2)) * STEP, STEP)]
        places[...] = (_listed if call.source == "chosen" else _paged)(refs, piece, i)
        plgpu.commit_smem()
        each = [places.at[pl.ds(slot * PAGE, PAGE)] for slot in range(2)]
        if not refs.on_device or refs.cache.dtype == jnp.uint8:
            for slot in range(2):
                (_fill if refs.on_device else _interpreted)(refs, slot, each[slot], number)
                _publish(refs, slot)
            return
        for slot in range(2):
            _empty(refs, slot, number)
            tokens.copy(refs.cache, each[slot], *_places(refs, slot))
        for slot in range(2):
            tokens.await_copies(1 - slot)
            _publish(refs, slot)

    lax.fori_loop(piece.first, piece.last, step, None)


def _publish(refs: Any, slot: int) -> None:
    for_wgmma(refs.on_device)
    for part in range(PARTS):
        plgpu.barrier_arrive(refs.full.at[slot * PARTS + part])


def _places(refs: Any, slot: int) -> tuple[Any, Any, Any]:
    """Shared memory of a page: both halves of the latents, and the keys."""
    return refs.latent_s.at[2 * slot], refs.latent_s.at[2 * slot + 1], refs.rope_s.at[slot]


def _paged(refs: Any, piece: Piece, i: Scalar) -> jax.Array:
    """Numbers of a step's tokens by the block table, -1 behind the request's end."""
    here = plgpu.broadcasted_iota(jnp.int32, (STEP,), 0, layout=LANES)
    last = jnp.int32(refs.cache.shape[0] // PAGE - 1)
    columns = jnp.int32(refs.table.shape[1] - 1)
    even, odd = (
        lax.max(jnp.int32(0), lax.min(last, refs.table[piece.request, lax.min(2 * i + k, columns)]))
        for k in range(2)
    )
    number = here + jnp.where(here < PAGE, even * PAGE, odd * PAGE - PAGE)
    return jnp.where(here + i * STEP < piece.length, number, -1)


def _listed(refs: Any, piece: Piece, i: Scalar) -> jax.Array:
    """The same of chosen tokens; their numbers are padded to whole steps."""
    chosen = refs.table.at[piece.request, pl.ds(i * STEP, STEP)]
    number = plgpu.load(chosen, layout=LANES, optimized=False)
    return jnp.where((number >= 0) & (number < refs.cache.shape[0]), number, -1)


def _empty(refs: Any, slot: int, number: Scalar) -> None:
    for part in range(PARTS):
        index = slot * PARTS + part
        pl.when(number > 0)(functools.partial(plgpu.barrier_wait, refs.empty.at[index]))


def _fill(refs: Any, slot: int, places: Any, number: Scalar) -> None:
    """64 tokens, half of them at a time; the first are on their way while the place is not free."""
    half = tokens.TOKENS
    left, right, rope = _places(refs, slot)
    found = tokens.load(refs.cache, places.at[pl.ds(0, half)])
    _empty(refs, slot, number)
    tokens.store(*found, left, right, 0)
    found = tokens.load(refs.cache, places.at[pl.ds(half, half)])
    for first in (0, half):
        tokens.copy_keys(refs.cache, places.at[pl.ds(first, half)], rope, first)
    tokens.store(*found, left, right, half)


def _interpreted(refs: Any, slot: int, places: Any, number: Scalar) -> None:
    _empty(refs, slot, number)
    plgpu.commit_smem()

    def one(t: Scalar, _: None) -> None:
        place = places[t]
        token = jnp.where(place >= 0, refs.cache[lax.max(place, jnp.int32(0))], 0)
        latent, key = _decoded(token)
        refs.latent_s[2 * slot, t] = latent[:HALF]
        refs.latent_s[2 * slot + 1, t] = latent[HALF:]
        refs.rope_s[slot, t] = key

    lax.fori_loop(0, ROWS, one, None)


def _decoded(token: jax.Array) -> tuple[jax.Array, jax.Array]:
    if token.dtype == jnp.bfloat16:
        return token[:LATENT], token[LATENT:]
    values = lax.bitcast_convert_type(token[:LATENT], jnp.float8_e4m3fn).astype(jnp.float32)
    scales = token[tokens.SCALES_AT : tokens.KEY_AT].reshape(-1, 4)
    scales = jnp.repeat(lax.bitcast_convert_type(scales, jnp.float32), LATENT // 4)
    key = lax.bitcast_convert_type(token[tokens.KEY_AT :].reshape(ROPE, 2), jnp.bfloat16)
    return (values * scales).astype(jnp.bfloat16), key
