"""A soak of the exchange: rounds of ever other tokens and routings, every row of them checked.

A round is drawn on the devices from its number: tokens, weights, and in turn a routing at random,
one to a single device, one that leaves a device out, and one in which a token's experts are all of
one device. Tokens are dispatched in bfloat16 and in e4m3, into room for the worst case, and
compared bit for bit with all devices' tokens, gathered. Then rows are scaled by their experts,
added up and brought home, where every device knows by itself what its tokens have to be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsjax.bench.exchange_check import ROUNDING, differing_bits, off_by_more
from dsjax.bench.exchange_loops import AXIS, Cards
from dsjax.bench.exchange_operands import Layouts, overflow, route
from dsjax.bench.exchange_shapes import Shape
from pallas_kernels.expert_exchange import (
    combine_rows,
    dispatch_quantized,
    dispatch_rows,
)
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.token_order import Exchange

LOOP = 100  # rounds of one program
FAR = 100.0  # past any normal score: such experts are a token's first, or its last


@dataclass
class Soak:
    """What was counted: rows that a dispatch and a combine got wrong."""

    asked: int
    done: int = 0
    dispatched: int = 0
    combined: int = 0
    memory_before: int | None = None
    """Bytes in use of the fullest device."""
    memory_after: int | None = None
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        return self.dispatched + self.combined > 0

    def __str__(self) -> str:
        return (
            f"{self.done} of {self.asked} rounds, {self.dispatched} wrong rows dispatched, "
            f"{self.combined} combined; device memory {_gib(self.memory_before)} before, "
            f"{_gib(self.memory_after)} after"
        )


def soak(
    rounds: int, cards: Cards, shape: Shape, layouts: Layouts, backend: Backend,
    begun: Callable[[str], None] = lambda what: None,
) -> Soak:  # fmt: skip
    """So many rounds, or those until Ctrl-C; `begun` hears of each program of LOOP rounds."""
    found, exchange = Soak(rounds, memory_before=_in_use(cards)), layouts(shape.ranks, None)
    some = cards.program(functools.partial(_rounds, exchange, shape, backend))
    try:
        while found.done < rounds:
            begun(f"soak: {found.done} of {rounds} rounds, failed: {found.failed}")
            stop = min(found.done + LOOP, rounds)
            limits = cards.divided(np.full((cards.count, 2), (found.done, stop), np.int32))
            dispatched, combined = np.asarray(some(limits)).sum(0)
            found.done = stop
            found.dispatched += int(dispatched)
            found.combined += int(combined)
    except KeyboardInterrupt:
        found.interrupted = True
    found.memory_after = _in_use(cards)
    return found


def _rounds(exchange: Exchange, shape: Shape, backend: Backend, limits: jax.Array) -> jax.Array:
    """[1, 2] wrong rows of the rounds from limits[0, 0] to limits[0, 1]."""
    one = functools.partial(_round, exchange, shape, backend)
    start = jnp.zeros(2, jnp.int32)
    return lax.fori_loop(limits[0, 0], limits[0, 1], lambda i, wrong: wrong + one(i), start)[None]


def _round(exchange: Exchange, shape: Shape, backend: Backend, i: jax.Array) -> jax.Array:
    common = jax.random.fold_in(jax.random.key(1), i)
    keys = jax.random.split(jax.random.fold_in(common, lax.axis_index(AXIS)), 4)
    x = jax.random.normal(keys[0], (shape.tokens, shape.dim), jnp.bfloat16)
    chosen = routing(i, common, keys[1], shape)
    weights = jax.random.uniform(keys[2], chosen.shape, minval=0.1)
    order = exchange.order(chosen, shape.local)
    slots, sizes, tokens, count, to = route(order, shape.local)
    way = slots, tokens, count
    remote: dict[str, Any] = dict(axis=AXIS, backend=backend)
    rows = len(order.choices)

    q, scale = quantize_tiles(x, backend="reference")
    moved = dispatch_rows(x, *way, rows=rows, **remote)
    pair = dispatch_quantized(q, scale, *way, rows=rows, **remote)
    used = jnp.arange(rows) < sizes.sum()
    everyones = [_gathered(part)[order.tokens] for part in (x, q, scale)]
    found = zip((moved, *pair), everyones, strict=True)
    differing = jnp.stack([differing_bits(one, other) for one, other in found])
    dispatched = (differing.any(axis=0) & used).sum(dtype=jnp.int32)

    factor = _factor(_gathered(chosen).reshape(-1))[order.choices]
    scaled = moved * factor[:, None].astype(moved.dtype)  # powers of two: exact
    known = slots, _gathered(weights), tokens, count, to
    back = combine_rows(scaled, *known, **remote)
    wanted = x.astype(jnp.float32) * (weights * _factor(chosen)).sum(axis=1, keepdims=True)
    combined = off_by_more(back, wanted, 2 * ROUNDING).sum(dtype=jnp.int32)
    return jnp.stack([dispatched + overflow(order)[0], combined])


def routing(i: jax.Array, common: jax.Array, own: jax.Array, shape: Shape) -> jax.Array:
    """[T, k] different experts: in turn any, one device's, all but one's, each token's one's."""
    scores = jax.random.normal(own, (shape.tokens, shape.experts))
    device = jnp.arange(shape.experts) // shape.local
    one = jax.random.randint(common, (), 0, shape.ranks)
    each = jax.random.randint(jax.random.fold_in(own, 1), (shape.tokens, 1), 0, shape.ranks)
    of_one, of_each = FAR * (device == one), FAR * (device == each)
    bias = jnp.stack([0 * of_each, of_one + 0 * of_each, -of_one + 0 * of_each, of_each])[i % 4]
    return lax.top_k(scores + bias, shape.top_k)[1].astype(jnp.int32)


def _factor(experts: jax.Array) -> jax.Array:
    return 2.0 ** (experts % 5)


def _gathered(x: jax.Array) -> jax.Array:
    """Of all devices; FP8 as bytes, which XLA never converts."""
    moved = lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x
    found = lax.all_gather(moved, AXIS, tiled=True)
    return lax.bitcast_convert_type(found, x.dtype) if moved is not x else found


def _in_use(cards: Cards) -> int | None:
    stats: list[dict[str, Any]] = [device.memory_stats() or {} for device in cards.mesh.devices]
    return max((each["bytes_in_use"] for each in stats if "bytes_in_use" in each), default=None)


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{size / 2**30:.3f} GiB"
