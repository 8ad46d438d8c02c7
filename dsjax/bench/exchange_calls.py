"""The timed calls of an exchange: the doors of `expert_exchange` and the layout they need.

A dispatch brings rows in the order of experts; `layout` is what both sides have to know before, and
costs time of its own. `reduce` adds up the rows of a token on their device, `combine` the sums of
devices, and `combine_rows` is both in one kernel, which stores instead of loading. At low
latency a dispatch casts to e4m3 itself and tells all devices of experts and weights, a combine is
both sums, and in a round experts are taken to give every token back as it came, so that it ends
with the tokens times the sums of their weights; layouts are ready before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.bench.exchange_loops import AXIS
from dsjax.bench.exchange_operands import ROOM, Layouts, Operands, route
from dsjax.bench.exchange_shapes import Kind, Shape
from pallas_kernels.expert_exchange import (
    cast_dispatch,
    combine_ranks,
    combine_rows,
    dispatch_quantized,
    dispatch_rows,
    reduce_rows,
)
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.quantize import dequantize
from pallas_kernels.token_order import Exchange

Which = Literal["used", "needed", "listed", "all"]
"""What of a result counts: rows that are somebody's, of tokens that are here, before `count`."""
Link = Literal["loads", "stores"]
Payload = Literal["fp8", "bf16"]


class How(NamedTuple):
    """What a call has to know besides its arrays."""

    exchange: Exchange
    shape: Shape
    rows: int
    backend: Backend

    @property
    def remote(self) -> dict[str, Any]:
        return dict(axis=AXIS, ctas=self.shape.ctas or None, backend=self.backend)


class Timed(NamedTuple):
    """A call on these operands; which rows of its results count, and how they are compared."""

    call: Callable[..., tuple[jax.Array, ...]]
    operands: tuple[str, ...]
    counts: tuple[Which, ...]
    exact: bool = True
    link: Link | None = None
    """What its kernel does between devices."""
    payloads: tuple[Payload, ...] = ()
    """What crosses, for peers."""


def prepared(
    kind: Kind, shape: Shape, layouts: Layouts, x: Operands, backend: Backend
) -> tuple[Callable[..., tuple[jax.Array, ...]], list[jax.Array]]:
    """The call of a device, and the arrays of all devices that it takes."""
    how = How(layouts(shape.ranks, ROOM), shape, len(x.rows) // shape.ranks, backend)
    timed = TIMED[kind]
    return functools.partial(timed.call, how), [getattr(x, name) for name in timed.operands]


def _layout(how: How, chosen: jax.Array) -> tuple[jax.Array, ...]:
    return route(how.exchange.order(chosen, how.shape.local), how.shape.local)


def _dispatch_fp8(how: How, q: jax.Array, scale: jax.Array, *way: jax.Array) -> Any:
    return dispatch_quantized(q, scale, *way, rows=how.rows, **how.remote)


def _with_layout(how: How, q: jax.Array, scale: jax.Array, chosen: jax.Array) -> Any:
    slots, sizes, tokens, count, to = _layout(how, chosen)
    return *_dispatch_fp8(how, q, scale, slots, tokens, count), slots, sizes, to


def _dispatch_bf16(how: How, x: jax.Array, *way: jax.Array) -> Any:
    return (dispatch_rows(x, *way, rows=how.rows, **how.remote),)


def _reduce(how: How, rows: jax.Array, slots: jax.Array, *others: jax.Array) -> Any:
    return (reduce_rows(rows, slots, *others, backend=how.backend),)


def _combine(how: How, partial: jax.Array, to: jax.Array) -> Any:
    return (combine_ranks(partial, to, **how.remote),)


def _combine_rows(how: How, rows: jax.Array, to: jax.Array, *others: jax.Array) -> Any:
    return (combine_rows(rows, *others, to, **how.remote),)


def _cast_dispatch(how: How, x: jax.Array, to: jax.Array, about: jax.Array) -> Any:
    return cast_dispatch(x, to, about, **how.remote)


def _both_sums(how: How, rows: jax.Array, to: jax.Array, *others: jax.Array) -> Any:
    return _combine(how, *_reduce(how, rows, *others), to)


def _round(
    how: How, x: jax.Array, to: jax.Array, about: jax.Array, slots: jax.Array, *others: jax.Array
) -> Any:
    q, scale, known = cast_dispatch(x, to, about, **how.remote)
    rows = dequantize(q, scale, x.dtype, block_rows=1)
    token = jnp.arange(len(slots), dtype=jnp.int32)[:, None]
    sums = _both_sums(how, rows, to, jnp.where(slots >= 0, token, -1), *others)
    return *sums, known


WAY = "slots", "tokens", "count"
SUMMED = "slots", "weights", "tokens", "count"
BOTH: tuple[Payload, ...] = ("fp8", "bf16")
TIMED: dict[Any, Timed] = {
    "layout": Timed(_layout, ("chosen",), ("all", "all", "listed", "all", "all")),
    "dispatch_fp8": Timed(
        _dispatch_fp8, ("q", "scale", *WAY), ("used", "used"), True, "loads",
        ("fp8",),
    ),
    "dispatch_fp8_with_layout": Timed(
        _with_layout, ("q", "scale", "chosen"), 
        ("used", "used", "all", "all", "all"), True, "loads", ("fp8",),
    ),
    "dispatch_bf16": Timed(_dispatch_bf16, ("x", *WAY), ("used",), True, "loads", ("bf16",)),
    "reduce": Timed(_reduce, ("rows", *SUMMED), ("needed",), False),
    "combine": Timed(_combine, ("partial", "to"), ("all",), False, "loads", ("bf16",)),
    "combine_rows": Timed(
        _combine_rows, ("rows", "to", *SUMMED), ("all",), False, "stores", ("bf16",)
    ),
    "low_latency_dispatch": Timed(
        _cast_dispatch, ("x", "to", "about"), ("needed", "needed", "all"), True, "stores", ("fp8",)
    ),
    "low_latency_combine": Timed(
        _both_sums, ("rows", "to", *SUMMED), ("all",), False, "loads", ("bf16",)
    ),
    "low_latency_round": Timed(
        _round, ("x", "to", "about", *SUMMED), ("all", "all"), False, None, BOTH
    ),
}  # fmt: skip
