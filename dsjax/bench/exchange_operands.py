"""What the timed calls of an exchange work on: normal tokens, routed to experts at random.

Every device draws its own tokens, `top_k` different experts for each, all equally likely, and
weights that add up to one. There is room for twice an even share of rows; what experts and devices
would have made of them is normal too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsjax.bench.exchange_loops import AXIS, Cards
from dsjax.bench.exchange_shapes import Kind, LinkShape, Shape
from dsjax.bench.shapes import Work
from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from pallas_kernels.token_order import Exchange, Order

ROOM = 2.0
Layouts = Callable[[int, float | None], Exchange]
"""The exchange over so many ranks of AXIS, with room for rows in even shares, None for the worst
case. The `route` of its orders has a `way` of `tokens`, `count` and `to`, as the functions of
`pallas_kernels.expert_exchange` take them, and `overflow`, None where there is none."""


class Operands(NamedTuple):
    """Of a device; S are the tokens of all, r the rows that it has room for."""

    x: jax.Array
    """[T, d] bfloat16; in e4m3 `q` with `scale`."""
    q: jax.Array
    scale: jax.Array
    chosen: jax.Array
    """[T, k] experts."""
    weights: jax.Array
    """[S, k]."""
    own_weights: jax.Array
    """[T, k]."""
    slots: jax.Array
    tokens: jax.Array
    count: jax.Array
    to: jax.Array
    sizes: jax.Array
    """Rows of each expert of a device."""
    overflow: jax.Array
    rows: jax.Array
    """[r, d] results of experts."""
    partial: jax.Array
    """[S, d] sums of a device."""
    w: jax.Array
    """[d, d] in e4m3, which tokens are multiplied by."""
    w_scale: jax.Array


@functools.lru_cache(maxsize=1)
def make(cards: Cards, shape: Shape, layouts: Layouts) -> Operands:
    """RuntimeError where chance wants more room than there is."""
    draw = functools.partial(_draw, shape, layouts(shape.ranks, ROOM))
    found: Operands = cards.program(draw)(cards.divided(np.arange(cards.count, dtype=np.int32)))
    if np.asarray(found.overflow).any():
        raise RuntimeError(f"{shape}: more than {ROOM} times an even share of rows on a device")
    return found


def route(order: Order, local: int) -> tuple[jax.Array, ...]:
    """The arrays of a layout: slots, sizes, tokens, count and to."""
    if order.sizes.shape != (local,):
        raise ValueError(f"sizes are {order.sizes.shape}: expected {local} experts of a device")
    way = order.route.way
    return order.slots, order.sizes, way.tokens, way.count, way.to


def overflow(order: Order) -> jax.Array:
    """[1], whether rows were left out."""
    found = order.route.overflow
    return jnp.zeros(1, bool) if found is None else found[None]


def _draw(shape: Shape, exchange: Exchange, device: jax.Array) -> Operands:
    keys = iter(jax.random.split(jax.random.fold_in(jax.random.key(0), device[0]), 6))
    t, d, k = shape.tokens, shape.dim, shape.top_k
    x = jax.random.normal(next(keys), (t, d), jnp.bfloat16)
    chosen = lax.top_k(jax.random.uniform(next(keys), (t, shape.experts)), k)[1].astype(jnp.int32)
    weights = jax.nn.softmax(jax.random.normal(next(keys), (t, k)))
    order = exchange.order(chosen, shape.local)
    slots, sizes, tokens, count, to = route(order, shape.local)
    return Operands(
        x, *quantize_tiles(x, backend="reference"), chosen,
        lax.all_gather(weights, AXIS, tiled=True), weights, slots, tokens, count, to, sizes,
        overflow(order),
        jax.random.normal(next(keys), (len(order.choices), d), jnp.bfloat16),
        jax.random.normal(next(keys), (shape.ranks * t, d), jnp.bfloat16),
        *quantize_blocks(jax.random.normal(next(keys), (d, d), jnp.bfloat16), backend="reference"),
    )  # fmt: skip


def crossings(cards: Cards, x: Operands) -> np.ndarray:
    """[ranks, ranks]: the tokens of a device (first axis) that have an expert on another."""
    return np.asarray(x.to).reshape(cards.count, -1, cards.count).sum(axis=1)


def work(kind: Kind, shape: Shape | LinkShape, remote_rows: float) -> Work:
    """Bytes that cross a link for one device; of `reduce`, which has none, those of its memory."""
    if isinstance(shape, LinkShape):
        return Work(0, int(remote_rows) * shape.bytes)
    return Work(0, round(BYTES[kind](shape, remote_rows)))


def _choices(shape: Shape, remote_rows: float) -> float:
    return 4 * (shape.ranks - 1) * shape.tokens * shape.top_k


def _fp8(shape: Shape, remote_rows: float) -> float:
    return remote_rows * shape.row_bytes[0]


def _bf16(shape: Shape, remote_rows: float) -> float:
    return remote_rows * shape.row_bytes[1]


def _memory(shape: Shape, remote_rows: float) -> float:
    """A row of each choice read, a sum written of each token that is here from any device."""
    here = shape.ranks * remote_rows / (shape.ranks - 1)
    return (shape.tokens * shape.top_k + here) * shape.row_bytes[1]


def _round(shape: Shape, remote_rows: float) -> float:
    return remote_rows * sum(shape.row_bytes)


BYTES: dict[Any, Callable[[Shape, float], float]] = {
    "layout": _choices, "dispatch_fp8": _fp8, "dispatch_fp8_with_layout": _fp8,
    "dispatch_bf16": _bf16, "reduce": _memory, "combine": _bf16, "combine_rows": _bf16,
    "dispatch_and_product": _fp8, "dispatch_beside_product": _fp8, "combine_and_product": _bf16,
    "combine_beside_product": _bf16,
    "low_latency_dispatch": _fp8, "low_latency_combine": _bf16, "low_latency_round": _round,
}  # fmt: skip
