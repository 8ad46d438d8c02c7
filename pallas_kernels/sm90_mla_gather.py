"""The warpgroup that gathers tokens for `sm90_mla_decode` where TMA cannot: FP8 pages, which become
bfloat16 on the way, and tokens that were chosen one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_mla_tokens as tokens
from pallas_kernels.sm90_mla_pages import (
    HALF,
    KEY,
    LATENT,
    PAGE,
    PARTS,
    QUARTER,
    QUARTERS,
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

Pages = tuple[tokens.Where, ...]
LANES = plgpu.Layout.WG_STRIDED((STEP,), 1)
LEFT, RIGHT = range(2)  # halves of a page's latents: two quarters each
# Halves of a step's pages in the order in which places for them become free and are read again.
HALVES = ((0, LEFT), (1, RIGHT), (0, RIGHT), (1, LEFT))
BATCHES = tokens.EACH // tokens.BATCH


def gather_all(call: Decode, refs: Any) -> None:
    total = pieces(refs, functools.partial(_gather, call, refs))

    @pl.when(total > 0)
    def _() -> None:
        plgpu.barrier_wait(refs.q_empty)
        for i in range(2 * PARTS):
            plgpu.barrier_wait(refs.empty.at[i])


def _gather(call: Decode, refs: Any, piece: Piece, done: Scalar) -> None:
    query = functools.partial(fetch_query, call, refs, piece, done)
    pl.when(done == 0)(query)
    run = _interpreted if not refs.on_device else _convert if _is_fp8(refs) else _copy

    def late_query(i: Scalar) -> None:
        """Its place becomes free when the piece before is done; pages need not wait for that."""
        pl.when((i == piece.first) & (done > 0))(query)

    run(call, refs, piece, done - piece.first, late_query)


def _is_fp8(refs: Any) -> bool:
    return refs.cache.dtype == jnp.uint8


def _convert(
    call: Decode, refs: Any, piece: Piece, earlier: Scalar, late_query: Callable[[Scalar], None]
) -> None:
    """FP8. While a half is stored, the next is on its way in registers. It is asked for as soon as
    all of the former has arrived and not later, for ptxas counts all loads in flight with one
    counter: whoever waits for one waits for those that were started since, too."""

    def load(pages: Pages, turn: int, batch: int) -> jax.Array:
        slot, half = HALVES[turn]
        return tokens.load(refs.cache, pages[slot], half, batch)

    def scales(pages: Pages, turn: int) -> jax.Array:
        slot, half = HALVES[turn]
        return tokens.load_scales(refs.cache, pages[slot], half)

    def step(i: Scalar, carry: Any) -> Any:
        raw, scale, now, found = carry
        coming = _begin(call, refs, piece, earlier, i, now, found)
        state = dict(raw=raw, scale=scale)

        def fill(turn: int, slot: int, half: int) -> None:
            raw, scale = state["raw"], state["scale"]
            by, place = tokens.factors(scale), _half(refs, slot, half)
            upcoming = (now, turn + 1) if turn < 3 else (coming, 0)
            for batch in range(BATCHES):
                tokens.store(raw[batch], by, place, batch)
                if batch > 0:
                    continue
                state["raw"] = [load(*upcoming, ahead) for ahead in range(BATCHES)]
                state["scale"] = scales(*upcoming)
                if turn == 3:
                    state["found"] = _look_up(call, refs, piece, i + 2)
            tokens.mend(scale, place)

        def keys(slot: int) -> None:
            tokens.copy_keys(refs.cache, now[slot], refs.rope_s.at[slot])
            tokens.end_group()

        _fill(refs, earlier + i, fill, keys, functools.partial(late_query, i))
        return state["raw"], state["scale"], coming, state["found"]

    now, found = _first(call, refs, piece)
    raw = [load(now, 0, batch) for batch in range(BATCHES)]
    lax.fori_loop(piece.first, piece.last, step, (raw, scales(now, 0), now, found))


def _fill(
    refs: Any, number: Scalar, fill: Callable[[int, int, int], None], keys: Callable[[int], None],
    query: Callable[[], None],
) -> None:  # fmt: skip
    """A step, half by half: fill(turn, slot, half) waits for nothing but what it stores; keys(slot)
    have two turns to arrive."""
    for turn, (slot, half) in enumerate(HALVES):
        if turn < 2:
            _await_empty(refs, slot, KEY, number)
            keys(slot)
        _await_empty(refs, slot, half, number)
        fill(turn, slot, half)
        late = turn - 1 if turn in (1, 2) else None
        if late is not None and refs.on_device:
            tokens.await_groups(1 - late)
        _publish(refs, (slot, half), *([] if late is None else [(late, KEY)]))
        if turn == 2:
            query()


def _copy(
    call: Decode, refs: Any, piece: Piece, earlier: Scalar, late_query: Callable[[Scalar], None]
) -> None:
    """Tokens in bfloat16. Whatever place is free is copied to before anything is waited for."""

    def step(i: Scalar, carry: Any) -> Any:
        now, found = carry
        coming = _begin(call, refs, piece, earlier, i, now, found)
        found = _look_up(call, refs, piece, i + 2)
        for turn, (slot, half) in enumerate(HALVES):
            if turn == 3:
                tokens.await_groups(1)
                _publish(refs, *((s, part) for s, own in HALVES[:2] for part in (KEY, own)))
                late_query(i)
            if turn < 2:
                _await_empty(refs, slot, KEY, earlier + i)
                tokens.copy_keys(refs.cache, now[slot], refs.rope_s.at[slot])
            _await_empty(refs, slot, half, earlier + i)
            tokens.copy(refs.cache, now[slot], half, _half(refs, slot, half))
            tokens.end_group()
        for turn in (2, 3):
            tokens.await_groups(3 - turn)
            _publish(refs, HALVES[turn])
        return coming, found

    lax.fori_loop(piece.first, piece.last, step, _first(call, refs, piece))


def _first(call: Decode, refs: Any, piece: Piece) -> tuple[Pages, Any]:
    """A piece's first pages, and what is known of the next."""
    first, second = (_look_up(call, refs, piece, piece.first + k) for k in range(2))
    return _pages(call, refs, piece, piece.first, first), second


def _begin(
    call: Decode, refs: Any, piece: Piece, earlier: Scalar, i: Scalar, now: Pages, found: Any
) -> Pages:
    """Pages of the next step, whose tokens L2 is told of."""
    pages = _pages(call, refs, piece, i + 1, found)

    @pl.when(i + 1 < piece.last)
    def _() -> None:
        for page in pages:
            tokens.prefetch(refs.cache, page)

    if call.source == "chosen":
        tokens.note(_noted(refs, earlier + i), *now)
    return pages


def _look_up(call: Decode, refs: Any, piece: Piece, i: Scalar) -> tuple[jax.Array, ...]:
    """Both pages of a step, or of the piece's last, as the table has them."""
    i = lax.min(i, piece.last - 1)
    if call.source == "chosen":
        return tuple(tokens.chosen(refs.table, piece.request, i, slot) for slot in range(2))
    return (tokens.entries(refs.table, piece.request, i),)


def _pages(call: Decode, refs: Any, piece: Piece, i: Scalar, found: tuple[jax.Array, ...]) -> Pages:
    """The same for `tokens`, which reads none that are not there."""
    if call.source == "chosen":
        return tuple(tokens.listed(refs.cache, entry, piece.request) for entry in found)
    left = piece.length - lax.min(i, piece.last - 1) * STEP
    both = tokens.paged(refs.cache, *found)
    return tuple((page, left - slot * PAGE) for slot, page in enumerate(both))


def _noted(refs: Any, number: Scalar) -> Any:
    return refs.places_s.at[pl.ds(lax.rem(number, jnp.int32(2)) * STEP, STEP)]


def _await_empty(refs: Any, slot: int, part: int, number: Scalar) -> None:
    for index in _indices(slot, part):
        pl.when(number > 0)(functools.partial(plgpu.barrier_wait, refs.empty.at[index]))


def _publish(refs: Any, *parts: tuple[int, int]) -> None:
    for_wgmma(refs.on_device)
    for slot, part in parts:
        for index in _indices(slot, part):
            plgpu.barrier_arrive(refs.full.at[index])


def _indices(slot: int, part: int) -> tuple[int, ...]:
    """Barriers of a page's keys or of a half of its latents."""
    own = (KEY,) if part == KEY else (2 * part, 2 * part + 1)
    return tuple(slot * PARTS + each for each in own)


def _half(refs: Any, slot: int, half: int) -> tuple[Any, ...]:
    """Shared memory of a page's latents, side by side."""
    first = slot * QUARTERS + 2 * half
    return refs.latent_s.at[first], refs.latent_s.at[first + 1]


# --- interpreted ------------------------------------------------------------------------------


def _interpreted(
    call: Decode, refs: Any, piece: Piece, earlier: Scalar, late_query: Callable[[Scalar], None]
) -> None:
    """The same, in the same order, token by token."""

    def step(i: Scalar, _: None) -> None:
        places = _noted(refs, earlier + i)
        places[...] = (_listed if call.source == "chosen" else _paged)(refs, piece, i)
        plgpu.commit_smem()

        def each(slot: int, store: Callable[[Scalar, jax.Array, jax.Array], None]) -> None:
            plgpu.commit_smem()

            def one(t: Scalar, _: None) -> None:
                place = places[slot * PAGE + t]
                token = jnp.where(place >= 0, refs.cache[lax.max(place, jnp.int32(0))], 0)
                store(t, *_decoded(token))

            lax.fori_loop(0, ROWS, one, None)

        def fill(_: int, slot: int, half: int) -> None:
            def store(t: Scalar, latent: jax.Array, _: jax.Array) -> None:
                for i, ref in enumerate(_half(refs, slot, half)):
                    first = half * HALF + i * QUARTER
                    ref[t] = latent[first : first + QUARTER]

            each(slot, store)

        def keys(slot: int) -> None:
            def store(t: Scalar, _: jax.Array, key: jax.Array) -> None:
                refs.rope_s[slot, t] = key

            each(slot, store)

        _fill(refs, earlier + i, fill, keys, functools.partial(late_query, i))

    lax.fori_loop(piece.first, piece.last, step, None)


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


def _decoded(token: jax.Array) -> tuple[jax.Array, jax.Array]:
    if token.dtype == jnp.bfloat16:
        return token[:LATENT], token[LATENT:]
    values = lax.bitcast_convert_type(token[:LATENT], jnp.float8_e4m3fn).astype(jnp.float32)
    scales = token[tokens.SCALES_AT : tokens.KEY_AT].reshape(-1, 4)
    scales = jnp.repeat(lax.bitcast_convert_type(scales, jnp.float32), LATENT // 4)
    key = lax.bitcast_convert_type(token[tokens.KEY_AT :].reshape(ROPE, 2), jnp.bfloat16)
    return (values * scales).astype(jnp.bfloat16), key
