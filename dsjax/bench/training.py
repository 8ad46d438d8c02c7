"""`run.py bench training`: what a training step does besides its GEMMs and attention.

Casts to FP8, SwiGLU, the permutation of tokens to experts and the head with its loss are timed in
turn with XLA's own way (how: `timing`), checked against the references, and set against what the
card itself can do: a copy of 1 GiB, and for the head XLA's BF16 matmul of 8192^3, measured first in
the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from dsjax.bench.ceilings import Device, measure_ceilings
from dsjax.bench.check import checked
from dsjax.bench.rows import OURS, Outcome, Row, check_settings, collect, described
from dsjax.bench.timing import Method, Program, Timing, interleaved
from dsjax.bench.training_calls import call, kernels, make, reference, work
from dsjax.bench.training_shapes import LITE, PARTS, Case, Kind, Part, Shape, Sizes, select
from pallas_kernels.device import is_gpu

XLA = "xla"


@dataclass(frozen=True)
class TrainingSettings:
    """What is timed, and for how long."""

    parts: tuple[Part, ...] = PARTS
    sizes: Sizes = LITE
    out: Path = Path("runs/bench_training")
    seconds: float = 0.1

    def cases(self) -> list[Case]:
        """ValueError for what cannot be run."""
        small = "--tokens 64 --dim 128 --expert-hidden 64 --shared-hidden 128 --vocab-size 512"
        check_settings(self.seconds, self.sizes != LITE or is_gpu(), small)
        return select(self.sizes, self.parts)


def bench_training(
    settings: TrainingSettings,
    begun: Callable[[str], None] = lambda what: None,
    measured: Callable[[Outcome[Kind, Shape]], None] = lambda outcome: None,
) -> Outcome[Kind, Shape]:
    """Measure ceilings, then every case; `begun` hears what starts, `measured` of each new row.

    Ctrl-C ends it with the rows so far. A call that fails (out of memory, say) has that as the note
    of its row; where XLA's way alone fails, ours is timed without it. Raises ValueError for
    settings that do not fit.
    """
    cases, device = settings.cases(), Device.present()
    method = Method.for_device(settings.seconds)
    begun("ceilings")
    outcome: Outcome[Kind, Shape] = Outcome(measure_ceilings(device, method), method)
    collect(outcome, cases, lambda *case: measure(*case, device, method), begun, measured)
    return outcome


def measure(kind: Kind, shape: Shape, device: Device, method: Method) -> Row[Kind, Shape]:
    """Time and check one row."""
    count = device.sets(work(kind, shape))
    sets = [make(jax.random.key(seed), kind, shape) for seed in range(count)]
    ours = Program(functools.partial(call, kind, kernels()), sets)
    xla = Program(functools.partial(call, kind, "reference"), sets)
    timings, note = timed(ours, xla, method)
    row = Row(kind, shape, timings, note=note)
    return checked(row, ours.outputs()[0], lambda: reference(kind, sets[0]))


def timed(ours: Program, xla: Program, method: Method) -> tuple[dict[str, Timing], str]:
    """Both, or ours alone and why."""
    try:
        return interleaved({XLA: xla, OURS: ours}, method), ""
    except Exception as problem:  # below, not here: it keeps what the failed call held
        note = f"without XLA: {described(problem)}"
    return interleaved({OURS: ours}, method), note
