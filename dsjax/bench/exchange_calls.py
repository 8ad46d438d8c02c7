"""The timed calls of an exchange: the doors of `expert_exchange` and the layout they need.

A dispatch brings rows in the order of experts; `layout` is what both sides have to know before, and
costs time of its own. `reduce` adds up the rows of a token on their device, `combine` the sums of
devices, and `combine_rows` is both in one kernel, which stores instead of loading. What is timed at
low latency is in `exchange_low_latency`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from dsjax.bench import exchange_low_latency as low_latency
from dsjax.bench import exchange_overlap as overlap
from dsjax.bench.exchange_loops import AXIS
from dsjax.bench.exchange_operands import ROOM, Layouts, Operands, route
from dsjax.bench.exchange_shapes import Kind, Shape
from pallas_kernels.expert_exchange import (
    combine_ranks,
    combine_rows,
    dispatch_quantized,
    dispatch_rows,
    reduce_rows,
)
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.token_order import Exchange

Which = Literal["used", "needed", "listed", "filled", "all"]
"""What of a result counts: rows that are somebody's, of tokens that are here, before `count`, of
experts that have equally many rows those up to their size."""
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
    state: Callable[..., Any] | None = None
    """What the call takes first, of the operands: made once in a program."""


class Prepared(NamedTuple):
    """The call of a device, the arrays of all devices that it takes, and how its state is made."""

    call: Callable[..., tuple[jax.Array, ...]]
    operands: list[jax.Array]
    state: Callable[..., Any] | None


def prepared(kind: Kind, shape: Shape, layouts: Layouts, x: Operands, backend: Backend) -> Prepared:
    timed, operands = TIMED[kind], [getattr(x, name) for name in TIMED[kind].operands]
    if timed.state is not None:
        return Prepared(timed.call, operands, functools.partial(timed.state, shape, backend))
    how = How(layouts(shape.ranks, ROOM), shape, len(x.rows) // shape.ranks, backend)
    return Prepared(functools.partial(timed.call, how), operands, None)


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


WAY = "slots", "tokens", "count"
SUMMED = "slots", "weights", "tokens", "count"
OWN = "x", "chosen", "own_weights"
RECEIVED: tuple[Which, ...] = ("filled", "filled", "all", "all", "all")
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
    "dispatch_and_product": Timed(
        overlap.dispatch_and_product, (*overlap.WEIGHT, *WAY), ("used", "used", "all"), False,
        "loads", ("fp8",),
    ),
    "dispatch_beside_product": Timed(
        overlap.dispatch_beside_product, (*overlap.WEIGHT, *WAY), ("used", "used", "all"), False,
        "loads", ("fp8",),
    ),
    "combine_and_product": Timed(
        overlap.combine_and_product, (*overlap.WEIGHT, "rows", "to", *SUMMED), ("all", "all"),
        False, "stores", ("bf16",),
    ),
    "combine_beside_product": Timed(
        overlap.combine_beside_product, (*overlap.WEIGHT, "rows", "to", *SUMMED), ("all", "all"),
        False, "stores", ("bf16",),
    ),
    "low_latency_dispatch": Timed(
        low_latency.dispatch, OWN, (*RECEIVED, "all"), True, "stores", ("fp8",),
        low_latency.opened,
    ),
    "low_latency_combine": Timed(
        low_latency.combine, OWN, ("all", "all"), False, "stores", ("bf16",), low_latency.opened
    ),
    "low_latency_round": Timed(
        low_latency.whole, OWN, ("all", *RECEIVED), False, None, BOTH, low_latency.opened
    ),
}  # fmt: skip
