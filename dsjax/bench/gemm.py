"""`run.py bench gemm`: the FP8 and BF16 matmuls beside XLA's and recorded DeepGEMM.

Each shape is timed in turn with XLA's matmuls of its size (how: `timing`), checked against a
float32 product, and set against what the card itself can do: XLA's FP8 and BF16 matmuls of 8192^3
and a copy of 1 GiB, measured first in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from dsjax.bench.ceilings import XLA_BF16, XLA_FP8, Device, buffers, measure_ceilings
from dsjax.bench.products import Operands, call, relative_error, xla
from dsjax.bench.rows import OURS, Outcome, Row, check_settings, collect
from dsjax.bench.shapes import KINDS, Kind, Shape, select, work
from dsjax.bench.timing import Method, Program, interleaved
from pallas_kernels.device import is_gpu


@dataclass(frozen=True)
class Settings:
    """What is timed, and for how long."""

    shapes: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = KINDS
    out: Path = Path("runs/bench_gemm")
    seconds: float = 0.1

    def cases(self) -> list[tuple[Kind, Shape]]:
        """ValueError for what cannot be run."""
        small = "--shapes 16x128x256 g2x16x128x256"
        check_settings(self.seconds, bool(self.shapes) or is_gpu(), small)
        return select(self.shapes, self.kinds)


def bench_gemm(
    settings: Settings,
    begun: Callable[[str], None] = lambda what: None,
    measured: Callable[[Outcome[Kind, Shape]], None] = lambda outcome: None,
) -> Outcome[Kind, Shape]:
    """Measure ceilings, then every case; `begun` hears what starts, `measured` of each new row.

    Ctrl-C ends it with the rows so far. A product that fails (out of memory, say) has that as the
    note of its row, and no timings. Raises ValueError for settings that do not fit.
    """
    cases, device = settings.cases(), Device.present()
    method = Method.for_device(settings.seconds)
    begun("ceilings")
    outcome: Outcome[Kind, Shape] = Outcome(measure_ceilings(device, method), method)
    collect(outcome, cases, lambda *case: measure(*case, device, method), begun, measured)
    return outcome


def measure(kind: Kind, shape: Shape, device: Device, method: Method) -> Row[Kind, Shape]:
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
