"""XLA's collectives on as many rows as a call of ours sends: dense and ragged all_to_all.

Dense has the mean of the rows between two devices, as if all were equally many; ragged those that
there are. Rows in e4m3 go as bytes with their scales behind them. Neither casts, nor sorts into the
order of experts, nor adds up: other calls' work would come on top.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsjax.bench.exchange_calls import Payload
from dsjax.bench.exchange_loops import AXIS, Cards, Loop
from dsjax.bench.exchange_shapes import Shape
from dsjax.bench.rows import described
from dsjax.bench.timing import Method
from pallas_kernels.device import is_gpu

DENSE, RAGGED = "dense", "ragged"


def loops(
    cards: Cards, shape: Shape, crossing: np.ndarray, payloads: Sequence[Payload], method: Method
) -> tuple[dict[str, Loop], str]:
    """Those that run here, and why others do not."""
    makers, notes, found = {DENSE: _dense, RAGGED: _ragged}, [], {}
    for name, maker in makers.items() if payloads else ():
        if name == RAGGED and not is_gpu():
            notes.append("without ragged: XLA compiles it for GPUs only")
            continue
        try:
            found[name] = maker(cards, shape, crossing, payloads, method)
        except Exception as problem:  # ours is timed without it
            notes.append(f"without {name}: {described(problem)}")
    return found, "; ".join(notes)


def mean_rows(crossing: np.ndarray) -> float:
    """Between two devices."""
    ranks = len(crossing)
    return float(crossing.sum() - crossing.trace()) / (ranks * (ranks - 1))


def _dense(
    cards: Cards, shape: Shape, crossing: np.ndarray, payloads: Sequence[Payload], method: Method
) -> Loop:
    ranks, rows = len(crossing), max(1, int(np.ceil(mean_rows(crossing))))
    sent = [_rows(cards, shape, ranks * rows, payload) for payload in payloads]

    def call(*sent: jax.Array) -> Any:
        return [lax.all_to_all(x.reshape(ranks, rows, -1), AXIS, 0, 0) for x in sent]

    return Loop(cards, call, sent, method)


def _ragged(
    cards: Cards, shape: Shape, crossing: np.ndarray, payloads: Sequence[Payload], method: Method
) -> Loop:
    most, came = int(crossing.sum(1).max()), int(crossing.sum(0).max())
    sent = [_rows(cards, shape, most, payload) for payload in payloads]
    room = [_rows(cards, shape, came, payload) for payload in payloads]
    before = np.cumsum(crossing, 1) - crossing, np.cumsum(crossing, 0) - crossing
    tables = before[0], crossing, before[1], crossing.T  # of a sender's data, then a receiver's
    known = [cards.divided(table.astype(np.int32)) for table in tables]

    def call(known: list[jax.Array], *arrays: jax.Array) -> Any:
        sizes, pairs = [table[0] for table in known], zip(arrays[::2], arrays[1::2], strict=True)
        return [lax.ragged_all_to_all(x, out, *sizes, axis_name=AXIS) for x, out in pairs]

    arrays = [x for pair in zip(sent, room, strict=True) for x in pair]
    return Loop(cards, call, [known, *arrays], method)


def _rows(cards: Cards, shape: Shape, rows: int, payload: Payload) -> jax.Array:
    width = shape.row_bytes[0] if payload == "fp8" else shape.dim
    dtype = jnp.uint8 if payload == "fp8" else jnp.bfloat16
    fill = functools.partial(_numbered, (rows, width), dtype)
    return cards.program(fill)(cards.divided(np.arange(cards.count, dtype=np.int32)))


def _numbered(shape: tuple[int, int], dtype: Any, device: jax.Array) -> jax.Array:
    first, second = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return ((first + second + device[0]) % 251).astype(dtype)
