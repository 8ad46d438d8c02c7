"""`run.py bench exchange`: tokens to the GPUs of their experts and back, within one host.

Calls are timed in loops on the devices (how: `exchange_loops`), beside XLA's collectives on as many
rows, and set against what bulk copies over the links can do, measured first in the same run. Every
timed result is checked against the reference, row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dsjax.bench import exchange_peers as peers
from dsjax.bench.ceilings import Ceilings, Device, measure_ceilings
from dsjax.bench.exchange_calls import TIMED, prepared
from dsjax.bench.exchange_check import checked
from dsjax.bench.exchange_links import measure_link
from dsjax.bench.exchange_loops import Cards, Loop, in_turn
from dsjax.bench.exchange_operands import Layouts, crossings, make
from dsjax.bench.exchange_shapes import PARTS, V3, Case, Kind, LinkShape, Part, Shape, Sizes, select
from dsjax.bench.exchange_soak import Soak, soak
from dsjax.bench.rows import OURS, Outcome, Row, check_settings, collect, described
from dsjax.bench.timing import Method
from dsjax.bench.training_calls import kernels
from pallas_kernels.device import is_gpu, is_hopper

ExchangeRow = Row[Kind, Shape | LinkShape]


@dataclass(frozen=True)
class ExchangeSettings:
    """What is timed, for how long, and by which layouts."""

    layouts: Layouts
    parts: tuple[Part, ...] = PARTS
    sizes: Sizes = V3
    ctas: tuple[int, ...] = (0,)
    rounds: int = 0
    out: Path = Path("runs/bench_exchange")
    seconds: float = 0.1

    def cases(self, cards: Cards) -> list[Case]:
        """Links where there are Hopper GPUs only; ValueError for what cannot be run."""
        small = "--tokens 16 --dim 128 --experts 16 --top-k 2"
        check_settings(self.seconds, self.sizes != V3 or is_gpu(), small)
        if self.rounds < 0:
            raise ValueError(f"rounds is {self.rounds}: expected 0, for no soak, or more")
        cases = select(self.sizes, self.parts, self.ctas, cards.count)
        there = [case for case in cases if is_hopper() or not isinstance(case[1], LinkShape)]
        if not there:
            raise ValueError("parts are links alone, and these need Hopper GPUs: give others too")
        return there


@dataclass
class ExchangeOutcome(Outcome[Kind, Shape | LinkShape]):
    """With the rows that cross for one device, on average, and what a soak counted."""

    remote_rows: dict[Shape | LinkShape, float] = field(default_factory=dict)
    soak: Soak | None = None


def bench_exchange(
    settings: ExchangeSettings,
    begun: Callable[[str], None] = lambda what: None,
    measured: Callable[[ExchangeOutcome], None] = lambda outcome: None,
) -> ExchangeOutcome:
    """Measure every case, then soak; `begun` hears what starts, `measured` of each new row.

    Ctrl-C ends it with the rows and rounds so far. A call that fails has that as the note of its
    row; where XLA's way alone fails, ours is timed without it. Raises ValueError for settings that
    do not fit and for less than two devices.
    """
    cards = Cards.present()
    cases, method = settings.cases(cards), Method.for_device(settings.seconds)
    begun("ceilings")
    outcome = ExchangeOutcome(_ceilings(method), method)

    def one(kind: Kind, shape: Shape | LinkShape) -> ExchangeRow:
        return measure(kind, shape, cards, settings.layouts, method, outcome.remote_rows)

    collect(outcome, cases, one, begun, lambda _: measured(outcome))
    if settings.rounds and not outcome.interrupted:
        _soak(outcome, settings, cards, begun)
        measured(outcome)
    return outcome


def measure(
    kind: Kind, shape: Shape | LinkShape, cards: Cards, layouts: Layouts, method: Method,
    remote_rows: dict[Shape | LinkShape, float],
) -> ExchangeRow:  # fmt: skip
    """Time and check one row, and add what crosses for its shape."""
    if isinstance(shape, LinkShape):
        remote_rows[shape] = shape.rows * (shape.ranks - 1)
        return measure_link(kind, shape, cards, method)
    x = make(cards, shape.drawn, layouts)
    crossing = crossings(cards, x)
    remote_rows[shape] = peers.mean_rows(crossing) * (shape.ranks - 1)
    call, operands, state = prepared(kind, shape, layouts, x, kernels())
    ours = Loop(cards, call, operands, method, state)
    others, note = peers.loops(cards, shape, crossing, TIMED[kind].payloads, method)
    row = Row(kind, shape, in_turn({OURS: ours, **others}, method), note=note)
    return checked(row, cards, layouts, x, ours.outputs())


def _soak(
    outcome: ExchangeOutcome, settings: ExchangeSettings, cards: Cards,
    begun: Callable[[str], None],
) -> None:  # fmt: skip
    shape = settings.sizes.shape(cards.count)
    try:
        found = soak(settings.rounds, cards, shape, settings.layouts, kernels(), begun)
    except Exception as problem:  # the rows still count
        outcome.rows.append(Row("soak", shape, note=described(problem), failed=True))
        return
    outcome.soak, outcome.interrupted = found, found.interrupted
    outcome.rows.append(Row("soak", shape, note=str(found), failed=found.failed))


def _ceilings(method: Method) -> Ceilings:
    """Of one device by itself: a copy bounds what sums rows there."""
    return measure_ceilings(Device.present(), method)
