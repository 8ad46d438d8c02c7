"""Whether the timed results of an exchange are right, row by row.

What was moved has the bits of the reference, in the rows that count. Sums differ from it by no more
than bfloat16 rounds a row's largest value: 2**-7 of that. A layout is compared with numpy's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.bench.check import noted
from dsjax.bench.exchange_calls import TIMED, Which, prepared
from dsjax.bench.exchange_loops import Cards, begun
from dsjax.bench.exchange_operands import Layouts, Operands
from dsjax.bench.exchange_shapes import Kind, Shape
from dsjax.bench.rows import Row

ROUNDING = 2.0**-7


def checked(row: Row, cards: Cards, layouts: Layouts, x: Operands, found: Any) -> Row:
    """The row, failed where a row of the result is wrong; its error is the share of such rows."""
    kind, shape = row.kind, row.shape
    if kind == "layout":
        wanted: Any = jax.tree.map(cards.divided, laid_out(np.asarray(x.chosen), shape))
    else:
        call, operands, state = prepared(kind, shape, layouts, x, "reference")
        once = cards.program(lambda *operands: begun(call, state, operands)(*operands))
        wanted = once(*operands)
    wrong, rows = counted(kind, cards, x, tuple(found), tuple(wanted))
    return judged(row, wrong, rows)


def judged(row: Row, wrong: int, rows: int) -> Row:
    if not rows:
        return noted(row, "no rows to check", failed=True)
    row = dataclasses.replace(row, error=wrong / rows)
    return noted(row, f"{wrong} of {rows} rows are wrong", failed=True) if wrong else row


def counted(
    kind: Kind, cards: Cards, x: Operands, found: tuple[Any, ...], wanted: tuple[Any, ...]
) -> tuple[int, int]:
    """(wrong rows, rows that count) of all results and devices."""
    timed = TIMED[kind]
    each = cards.program(functools.partial(_differing, timed.counts, timed.exact))
    known = {"sizes": x.sizes, "slots": x.slots, "count": x.count}
    wrong, rows = np.asarray(each(found, wanted, known)).sum(0)
    return int(wrong), int(rows)


def _differing(
    counts: tuple[Which, ...], exact: bool, found: Any, wanted: Any, known: dict[str, jax.Array]
) -> jax.Array:
    total = jnp.zeros((1, 2), jnp.int32)
    for which, one, other in zip(counts, found, wanted, strict=True):
        same = exact or one.dtype == jnp.int32
        wrong = differing_bits(one, other) if same else off_by_more(one, other)
        there = _counting(which, len(wrong), known)
        total += jnp.stack([(wrong & there).sum(), there.sum()]).astype(jnp.int32)
    return total


def differing_bits(one: jax.Array, other: jax.Array) -> jax.Array:
    """Of each row whether any bit differs."""
    one, other = (_bits(x).reshape(len(x), -1) for x in (one, other))
    return (one != other).any(axis=1)


def off_by_more(one: jax.Array, other: jax.Array, tolerance: float = ROUNDING) -> jax.Array:
    """Of each row whether any value is off by more of the row's largest one, or not a number."""
    one, other = one.astype(jnp.float32), other.astype(jnp.float32)
    bound = tolerance * jnp.abs(other).max(axis=1, keepdims=True)
    return ~(jnp.abs(one - other) <= bound).all(axis=1)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool:
        return x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    return jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize])


def _counting(which: Which, rows: int, known: dict[str, jax.Array]) -> jax.Array:
    place = jnp.arange(rows)
    if which == "used":
        return place < known["sizes"].sum()
    if which == "filled":
        each = rows // len(known["sizes"])
        return place % each < known["sizes"][place // each]
    if which == "listed":
        return place < known["count"][0]
    if which == "needed":
        return (known["slots"] >= 0).any(axis=1)
    return jnp.ones(rows, bool)


def laid_out(chosen: np.ndarray, shape: Shape) -> tuple[np.ndarray, ...]:
    """The layout of all devices behind one another, from all choices [S, k]."""
    parts = [_of_rank(chosen, shape, rank) for rank in range(shape.ranks)]
    slots, sizes, tokens, count = (np.concatenate(part) for part in zip(*parts, strict=True))
    owner = chosen // shape.local
    to = (owner[:, :, None] == np.arange(shape.ranks)).any(axis=1)
    return slots, sizes, tokens, count, to


def _of_rank(chosen: np.ndarray, shape: Shape, rank: int) -> tuple[np.ndarray, ...]:
    """Slots, sizes, listed tokens (-1 behind the last) and their count."""
    slots = np.full(chosen.shape, -1, np.int32)
    sizes, row = np.zeros(shape.local, np.int32), 0
    for i in range(shape.local):
        token, choice = np.nonzero(chosen == rank * shape.local + i)
        sizes[i] = len(token)
        slots[token, choice] = row + np.arange(len(token), dtype=np.int32)
        row += len(token)
    here = np.flatnonzero((slots >= 0).any(axis=1)).astype(np.int32)
    tokens = np.full(len(chosen), -1, np.int32)
    tokens[: len(here)] = here
    return slots, sizes, tokens, np.array([len(here)], np.int32)
