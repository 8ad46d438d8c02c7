"""`run.py bench gemm`: the FP8 and BF16 matmuls beside XLA's and recorded DeepGEMM.

Each shape is timed in turn with XLA's matmuls of its size (how: `timing`), checked against a
float32 product, and set against what the card itself can do: XLA's FP8 and BF16 matmuls of 8192^3
and a copy of 1 GiB, measured first in the same run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax

from dsjax.bench.ceilings import XLA_BF16, XLA_FP8, Ceilings, Device, buffers, measure_ceilings
from dsjax.bench.products import Operands, call, relative_error, xla
from dsjax.bench.shapes import KINDS, Kind, Shape, Work, select, work
from dsjax.bench.timing import Method, Program, Timing, interleaved
from pallas_kernels.device import is_gpu

OURS = "ours"


@dataclass(frozen=True)
class Settings:
    """What is timed, and for how long."""

    shapes: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = KINDS
    out: Path = Path("runs/bench_gemm")
    seconds: float = 0.1

    def cases(self) -> list[tuple[Kind, Shape]]:
        """ValueError for what cannot be run."""
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}: expected a positive number")
        if not self.shapes and not is_gpu():
            raise ValueError(
                "there is no GPU for the default shapes: give small ones, such as --shapes "
                "16x128x256 g2x16x128x256, to time the reference path"
            )
        return select(self.shapes, self.kinds)


@dataclass(frozen=True)
class Row:
    """One product: its timing and XLA's, its error or why there is none."""

    kind: Kind
    shape: Shape
    timings: dict[str, Timing] = field(default_factory=dict)
    error: float | None = None
    note: str = ""
    failed: bool = False

    @property
    def work(self) -> Work:
        return work(self.kind, self.shape)

    def seconds(self, name: str = OURS) -> float | None:
        return self.timings[name].seconds if name in self.timings else None


@dataclass
class Outcome:
    """All that was measured, in the order it was."""

    ceilings: Ceilings
    method: Method
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False


def bench_gemm(
    settings: Settings,
    begun: Callable[[str], None] = lambda what: None,
    measured: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Measure ceilings, then every case; `begun` hears what starts, `measured` of each new row.

    Ctrl-C ends it with the rows so far. A product that fails (out of memory, say) has that as the
    note of its row, and no timings. Raises ValueError for settings that do not fit.
    """
    cases, device = settings.cases(), Device.present()
    method = Method.for_device(settings.seconds)
    begun("ceilings")
    outcome = Outcome(measure_ceilings(device, method), method)
    try:
        for row in _rows(cases, device, method, begun):
            outcome.rows.append(row)
            measured(outcome)
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def _rows(
    cases: Sequence[tuple[Kind, Shape]],
    device: Device,
    method: Method,
    begun: Callable[[str], None],
) -> Iterator[Row]:
    for kind, shape in cases:
        begun(f"{kind} {shape}")
        try:
            yield measure(kind, shape, device, method)
        except Exception as problem:  # whatever a kernel may raise: the other rows still count
            if os.environ.get("DSJAX_TRACEBACK"):
                raise
            first_line = str(problem).strip().partition("\n")[0]
            yield Row(kind, shape, note=f"{type(problem).__name__}: {first_line}", failed=True)


def measure(kind: Kind, shape: Shape, device: Device, method: Method) -> Row:
    """Time one product and XLA's of its size, interleaved, and check it."""
    sets = buffers(kind, shape, device)

    def product(x: Operands) -> jax.Array:
        return call(kind, x)

    programs: dict[str, Program] = {}
    if not shape.groups and kind in ("dense", "bf16"):
        if kind == "dense":
            programs[XLA_FP8] = Program(xla, sets)
        programs[XLA_BF16] = Program(xla, buffers("bf16", shape, device))
    programs[OURS] = Program(product, sets)
    timings = interleaved(programs, method)
    if work(kind, shape).flops > device.checked:
        return Row(kind, shape, timings, note="too large to check")
    error = relative_error(kind, shape, sets[0], programs[OURS].outputs()[0])
    if not math.isfinite(error):
        return Row(kind, shape, timings, note="the result is not finite", failed=True)
    return Row(kind, shape, timings, error)
