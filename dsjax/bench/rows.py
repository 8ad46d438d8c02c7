"""Rows of a benchmark, one after the other: each is measured or says why it is not."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsjax.bench.ceilings import Ceilings
from dsjax.bench.timing import Method, Timing

OURS = "ours"


@dataclass(frozen=True)
class Row[Kind: str, Shape]:
    """One call: its timing and those of its peers, its error or why there is none."""

    kind: Kind
    shape: Shape
    timings: dict[str, Timing] = field(default_factory=dict)
    error: float | None = None
    note: str = ""
    failed: bool = False

    def seconds(self, name: str = OURS) -> float | None:
        return self.timings[name].seconds if name in self.timings else None


@dataclass
class Outcome[Kind: str, Shape]:
    """All that was measured, in the order it was."""

    ceilings: Ceilings
    method: Method
    rows: list[Row[Kind, Shape]] = field(default_factory=list)
    interrupted: bool = False


def check_settings(seconds: float, has_shapes: bool, small: str) -> None:
    """ValueError for a time that is no time, or without shapes that this machine can do."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}: expected a positive number")
    if not has_shapes:
        raise ValueError(
            f"there is no GPU for the default shapes: give small ones, such as {small}, to time "
            "the reference path"
        )


def collect[Kind: str, Shape](
    outcome: Outcome[Kind, Shape],
    cases: Sequence[tuple[Kind, Shape]],
    measure: Callable[[Kind, Shape], Row[Kind, Shape]],
    begun: Callable[[str], None],
    measured: Callable[[Outcome[Kind, Shape]], None],
) -> None:
    """Add a row a case; `begun` hears what starts, `measured` of each new row.

    Ctrl-C ends it with the rows so far. A call that fails (out of memory, say) has that as the note
    of its row, and no timings.
    """
    try:
        for kind, shape in cases:
            begun(f"{kind} {shape}")
            outcome.rows.append(_row(kind, shape, measure))
            measured(outcome)
    except KeyboardInterrupt:
        outcome.interrupted = True


def _row[Kind: str, Shape](
    kind: Kind, shape: Shape, measure: Callable[[Kind, Shape], Row[Kind, Shape]]
) -> Row[Kind, Shape]:
    try:
        return measure(kind, shape)
    except Exception as problem:  # whatever a kernel may raise: the other rows still count
        if os.environ.get("DSJAX_TRACEBACK"):
            raise
        return Row(kind, shape, note=described(problem), failed=True)


def described(problem: Exception) -> str:
    first_line = str(problem).strip().partition("\n")[0]
    return f"{type(problem).__name__}: {first_line}"
