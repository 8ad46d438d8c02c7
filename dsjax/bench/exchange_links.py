"""The ceilings of an exchange: what bulk copies between all devices at once move, either way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.bench.exchange_check import differing_bits, judged
from dsjax.bench.exchange_loops import AXIS, Cards, Loop, in_turn
from dsjax.bench.exchange_shapes import Kind, LinkShape
from dsjax.bench.rows import OURS, Row
from dsjax.bench.timing import Method
from pallas_kernels.sm90_link_ceilings import last_loaded, loads, stores
from pallas_kernels.sm90_peers import Peers


def measure_link(kind: Kind, shape: LinkShape, cards: Cards, method: Method) -> Row:
    """Time and check one."""
    height = shape.rows if kind == "link_loads" else shape.ctas
    draw = functools.partial(_draw, (height, shape.bytes // 2))
    x = cards.program(draw)(cards.divided(np.arange(cards.count, dtype=np.int32)))
    loop = Loop(cards, functools.partial(_call, kind, shape), [x], method)
    row = Row(kind, shape, in_turn({OURS: loop}, method))
    count: Callable[..., Any] = functools.partial(wrong_rows, kind, shape)
    wrong, rows = np.asarray(cards.program(count)(x, loop.outputs())).sum(0)
    return judged(row, int(wrong), int(rows))


def _draw(shape: tuple[int, int], device: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(jax.random.key(0), device[0]), shape, jnp.bfloat16)


def _call(kind: Kind, shape: LinkShape, x: jax.Array) -> jax.Array:
    peers = Peers.along(AXIS)
    if kind == "link_loads":
        return loads(x, ctas=shape.ctas, peers=peers)
    return stores(x, rows=shape.rows, peers=peers)


def wrong_rows(kind: Kind, shape: LinkShape, x: jax.Array, found: jax.Array) -> jax.Array:
    """[1, 2]: how many rows of a device's result are wrong, and how many there are."""
    me, ranks, rows = jax.lax.axis_index(AXIS), shape.ranks, shape.rows
    everyones = jax.lax.all_gather(x, AXIS)
    if kind == "link_loads":
        ctas, stages, width = found.shape
        rank, row, there = last_loaded(rows, ctas, stages, ranks, me)
        found = found.reshape(-1, width)
        rank, row, there = rank.reshape(-1), jnp.where(there, row, 0).reshape(-1), there.reshape(-1)
    else:
        place = jnp.arange(ranks * rows)
        rank, row = place // rows, place % rows % len(x)
        there = rank != me
    wrong = differing_bits(found, everyones[rank, row]) & there
    return jnp.stack([wrong.sum(), there.sum()]).astype(jnp.int32)[None]
