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
HALF, QUARTER = LATENT // 2, LATENT // 4
QUARTERS, PARTS = 4, 5  # of a page: quarters of the latents and, last, the rotated keys
KEY = QUARTERS
# Parts (slot, part) in the order in which they become free, for a warp each. The smaller the parts,
# the sooner the next page comes: its way is most of what the loop waits for.
QUEUES = (
    ((0, KEY), (0, 0), (0, 1)),
    ((0, 2), (0, 3)),
    ((1, KEY), (1, 2), (1, 3)),
    ((1, 0), (1, 1)),
)


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
    begin, first, length = (refs.starts[part, k] for k in range(3))
    end, last = (refs.starts[part + 1, k] for k in range(2))

    def some(request: Scalar, carry: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        done, length = carry
        upcoming = refs.lengths[lax.min(request + 1, jnp.int32(refs.lengths.shape[0] - 1))]
        steps = lax.max(lax.div(length + (STEP - 1), jnp.int32(STEP)), jnp.int32(1))
        start = lax.select(request == begin, first, jnp.int32(0))
        stop = lax.select(request == end, last, steps)
        split = (start > 0) | (stop < steps)
        slot = 2 * part + lax.convert_element_type(start == 0, jnp.int32)
        body(Piece(request, length, start, stop, split, slot), done)
        return done + stop - start, upcoming

    after = lax.select(last > 0, end + 1, end)
    return lax.fori_loop(begin, after, some, (jnp.int32(0), length))[0]


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
            plgpu.barrier_wait(refs.empty.at[slot * PARTS + part])


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
        if with_query:  # behind keys, whose place is free while the last piece's output leaves
            query = functools.partial(fetch_query, call, refs, piece, done)
            pl.when(i == piece.first)(query)
        if call.pair and refs.on_device and queue in (QUEUES[1], QUEUES[3]):
            ahead = functools.partial(prefetch, refs.cache.at[upcoming[0]])
            pl.when((i + 1 < piece.last) & (block(call) == 0))(ahead)
        return upcoming

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
    index = slot * PARTS + part
    pl.when(taken)(lambda: plgpu.barrier_wait(refs.empty.at[index]))
    if not refs.on_device:  # there WGMMA reads it, here threads do
        plgpu.commit_smem()
    columns = pl.ds(part * QUARTER, ROPE if part == KEY else QUARTER)
    place = refs.rope_s.at[slot] if part == KEY else refs.latent_s.at[slot * QUARTERS + part]
    shared: dict[str, Any] = dict(collective_axes="pair") if call.pair else {}
    plgpu.copy_gmem_to_smem(refs.cache.at[page, :, columns], place, refs.full.at[index], **shared)
