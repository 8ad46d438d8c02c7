"""`run.py bench mla`: the attention kernels beside recorded FlashMLA, and beside cuDNN.

Decode on a paged cache of latents (dense, ragged, with an FP8 cache, sparse) and attention of
prefill and training are timed hot (how: `timing`), checked against the float32 references, and set
against what the card itself can do: XLA's BF16 matmul of 8192^3 and a copy of 1 GiB, measured first
in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsjax.bench.ceilings import Device, measure_ceilings
from dsjax.bench.mla_decode import DecodeRows, measure_sparse
from dsjax.bench.mla_prefill import measure_prefill
from dsjax.bench.mla_shapes import PARTS, Case, Kind, Part, Shape, select
from dsjax.bench.rows import Outcome, Row, check_settings, collect
from dsjax.bench.timing import Method
from pallas_kernels.device import is_gpu


@dataclass(frozen=True)
class MlaSettings:
    """What is timed, and for how long."""

    shapes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = tuple(PARTS)
    out: Path = Path("runs/bench_mla")
    seconds: float = 0.1

    def cases(self) -> list[Case]:
        """ValueError for what cannot be run."""
        small = "--shapes b2xs1xh16xt128 b1xh2xt128 b2xs1xh16xk64"
        check_settings(self.seconds, bool(self.shapes) or is_gpu(), small)
        return select(self.shapes, self.parts)


def bench_mla(
    settings: MlaSettings,
    begun: Callable[[str], None] = lambda what: None,
    measured: Callable[[Outcome[Kind, Shape]], None] = lambda outcome: None,
) -> Outcome[Kind, Shape]:
    """Measure ceilings, then every case; `begun` hears what starts, `measured` of each new row.

    Ctrl-C ends it with the rows so far. A call that fails (out of memory, say) has that as the note
    of its row. Raises ValueError for settings that do not fit.
    """
    cases, device = settings.cases(), Device.present()
    method = Method.for_device(settings.seconds)
    begun("ceilings")
    outcome: Outcome[Kind, Shape] = Outcome(measure_ceilings(device, method), method)
    decode = DecodeRows([case for case in cases if case[1].form == "decode"], device)
    collect(outcome, cases, lambda *case: measure(*case, decode, device, method), begun, measured)
    return outcome


def measure(
    kind: Kind, shape: Shape, decode: DecodeRows, device: Device, method: Method
) -> Row[Kind, Shape]:
    """Time and check one row."""
    if shape.form == "decode":
        return decode.measure(kind, shape, method)
    measure_other = measure_sparse if shape.form == "sparse" else measure_prefill
    return measure_other(kind, shape, device, method)
