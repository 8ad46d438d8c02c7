"""What an SM does of paged decode, pieces of requests, and the warps that fetch it page by page."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import ceil_div
from pallas_kernels.sm90_mla_plan import STEP
from pallas_kernels.sm90_registers import prefetch

Scalar = Any
ROWS, PAGE, LATENT, ROPE = 64, 64, 512, 64
HALF = LATENT // 2
LEFT, RIGHT, KEY = range(3)  # parts of a page: halves of the latent, and the rotated key
QUEUES = (((0, KEY), (0, LEFT)), ((0, RIGHT),), ((1, KEY), (1, RIGHT)), ((1, LEFT),))


@dataclasses.dataclass(frozen=True)
class Decode:
    """The static side of a call.

    rows: query rows of a request, heads fastest. heads: rows of one query token.
    visible_to_all: whether every query sees every token (no causal mask).
    pair: whether two row blocks form a cluster.
    source: how tokens are found: whole "pages" of bfloat16, FP8 pages token by token ("tokens"), or
    FP8 tokens that are listed ("chosen").
    """

    rows: int
    heads: int
    scale: float
    visible_to_all: bool
    pair: bool = False
    source: str = "pages"

    @property
    def blocks(self) -> int:
        return ceil_div(self.rows, ROWS)

    @property
    def hidden(self) -> int:
        """Tokens at the end that the first query does not see."""
        return 0 if self.visible_to_all else self.rows // self.heads - 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """Steps [first, last) of a request; `slot` of the partial outputs if they are not all."""

    request: Scalar
    length: Scalar
    first: Scalar
    last: Scalar
    split: Scalar
    slot: Scalar


def pieces(refs: Any, body: Callable[[Piece, Scalar], None]) -> Scalar:
    """body(piece, steps before it) for each of this part; returns the number of steps."""
    part = lax.axis_index("part")
    (begin, first), (end, last) = (
        (refs.starts[part + i, 0], refs.starts[part + i, 1]) for i in range(2)
    )

    def some(request: Scalar, done: Scalar) -> Scalar:
        length = refs.lengths[request]
        steps = lax.max(lax.div(length + (STEP - 1), jnp.int32(STEP)), jnp.int32(1))
        start = lax.select(request == begin, first, jnp.int32(0))
        stop = lax.select(request == end, last, steps)
        split = (start > 0) | (stop < steps)
        slot = 2 * part + lax.convert_element_type(start == 0, jnp.int32)
        body(Piece(request, length, start, stop, split, slot), done)
        return done + stop - start

    after = lax.select(last > 0, end + 1, end)
    return lax.fori_loop(begin, after, some, jnp.int32(0))


def block(call: Decode) -> Scalar:
    block = lax.axis_index("block")
    return 2 * block + lax.axis_index("pair") if call.pair else block


def fetch_all(call: Decode, refs: Any, warp: int | None) -> None:
    """A warp's queue of (slot, part): none waits for another's place to become free. The
    interpreter, which has no warps, takes all of them in turn."""
    queue = QUEUES[warp] if warp is not None else sum(QUEUES, ())
    total = pieces(refs, functools.partial(_fetch, call, refs, queue, warp in (0, None)))

    @pl.when(total > 0)  # the last phases: a neighbour in the cluster may still arrive at them
    def _() -> None:
        if warp in (0, None):
            plgpu.barrier_wait(refs.q_empty)
        for slot, part in queue:
            plgpu.barrier_wait(refs.empty.at[slot * 3 + part])


def _fetch(
    call: Decode, refs: Any, queue: tuple[tuple[int, int], ...], with_query: bool, piece: Piece,
    done: Scalar,
) -> None:  # fmt: skip
    count = lax.max(lax.div(piece.length + (PAGE - 1), jnp.int32(PAGE)), jnp.int32(1))
    slots = sorted({slot for slot, _ in queue})
    behind = lax.min(count, jnp.int32(refs.table.shape[1]))

    def pages(i: Scalar) -> tuple[Scalar, ...]:
        """Table entries behind the last page may be anything: that page is taken once more."""
        found = (refs.table[piece.request, lax.min(2 * i + slot, behind - 1)] for slot in slots)
        last = jnp.int32(refs.cache.shape[0] - 1)
        return tuple(lax.max(jnp.int32(0), lax.min(page, last)) for page in found)

    def step(i: Scalar, now: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        upcoming = pages(i + 1)
        for slot, part in queue:
            page = now[slots.index(slot)]
            _fetch_part(call, refs, page, slot, part, done + i - piece.first > 0)
        if call.pair and refs.on_device and queue in (QUEUES[1], QUEUES[3]):
            ahead = functools.partial(prefetch, refs.cache.at[upcoming[0]])
            pl.when((i + 1 < piece.last) & (block(call) == 0))(ahead)
        return upcoming

    if with_query:
        fetch_query(call, refs, piece, done)
    lax.fori_loop(piece.first, piece.last, step, pages(piece.first))


def fetch_query(call: Decode, refs: Any, piece: Piece, done: Scalar) -> None:
    rows = pl.ds(block(call) * ROWS, ROWS)
    pl.when(done > 0)(lambda: plgpu.barrier_wait(refs.q_empty))
    if not refs.on_device:
        plgpu.commit_smem()
    q = refs.q.at[piece.request]
    key = q.at[rows, pl.ds(LATENT, ROPE)]
    plgpu.copy_gmem_to_smem(key, refs.weights_s.at[0], refs.key_full)
    for half in range(2):
        columns = pl.ds(half * HALF, HALF)
        plgpu.copy_gmem_to_smem(q.at[rows, columns], refs.q_s.at[half], refs.q_full)


def _fetch_part(call: Decode, refs: Any, page: Scalar, slot: int, part: int, taken: Scalar) -> None:
    index = slot * 3 + part
    pl.when(taken)(lambda: plgpu.barrier_wait(refs.empty.at[index]))
    if not refs.on_device:  # there WGMMA reads it, here threads do
        plgpu.commit_smem()
    place = (refs.left_s, refs.right_s, refs.rope_s)[part].at[slot]
    columns = pl.ds((0, HALF, LATENT)[part], (HALF, HALF, ROPE)[part])
    shared: dict[str, Any] = dict(collective_axes="pair") if call.pair else {}
    plgpu.copy_gmem_to_smem(refs.cache.at[page, :, columns], place, refs.full.at[index], **shared)
