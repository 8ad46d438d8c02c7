"""One recipe in BF16, in FP8 and in FP8 with departures from DeepSeek-V3's recipe: how far apart?

The measure is V3's (report, appendix B.1): the relative difference of the training loss to BF16's
at the same step, both smoothed. Seeds, batches and initial weights are the same, but for the
variants that show what others do: another seed for both, and other weights on the same batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsjax.config import Fp8, Run
from dsjax.train.metrics import JSONL, read_lines
from dsjax.train.smooth import smooth

BASE = "bf16"
WINDOW = 100  # steps that a loss is smoothed over
SETTLED = 0.1  # of the steps are left out: losses fall too fast to be compared
ALLOWED = 0.0025  # relative difference that V3's report found FP8 to stay below

VARIANTS: dict[str, Callable[[Run], Run]] = {
    BASE: lambda run: replace(run, precision="bf16"),
    "bf16_again": lambda run: replace(run, precision="bf16"),
    "bf16_other_seed": lambda run: replace(
        run, precision="bf16", train=replace(run.train, seed=run.train.seed + 1)
    ),
    "bf16_other_weights": lambda run: replace(
        run,
        precision="bf16",
        train=replace(run.train, seed=run.train.seed + 1),
        data=replace(run.data, seed=run.data_seed),
    ),
    "fp8": lambda run: replace(run, precision="fp8"),
    "fp8_unpromoted": lambda run: replace(run, precision="fp8", fp8=Fp8(sum_bits=13)),
    "fp8_gradient_blocks": lambda run: replace(run, precision="fp8", fp8=Fp8(gradient_blocks=True)),
}


@dataclass(frozen=True)
class Curve:
    """The training loss of one variant, step by step."""

    name: str
    steps: np.ndarray
    loss: np.ndarray
    held_out: float | None
    """Nats a token at the end, if the run got there."""
    overflowed: float | None
    """Tiles that were not finite in FP8, all steps together; None without FP8."""

    @property
    def smoothed(self) -> np.ndarray:
        return smooth(self.loss, WINDOW)


@dataclass(frozen=True)
class Difference:
    """A variant's smoothed loss against BF16's, relative to it; the first tenth left out."""

    name: str
    last: float
    mean: float
    most: float
    """The largest magnitude."""


def variant(run: Run, name: str) -> Run:
    """The recipe as that variant; ValueError if there is none of the name."""
    if name not in VARIANTS:
        raise ValueError(f"variant is {name!r}: use {', '.join(VARIANTS)}")
    return replace(VARIANTS[name](run), name=name)


def read_curve(folder: Path, name: str) -> Curve | None:
    """What a run has written so far, None before its first step."""
    records = list(read_lines(folder / JSONL))
    steps = [record for record in records if record["kind"] == "train"]
    if not steps:
        return None
    evals = [record for record in records if record["kind"] == "eval"]
    counted = [record["fp8_overflowed_tiles"] for record in steps
               if "fp8_overflowed_tiles" in record]  # fmt: skip
    return Curve(
        name,
        np.array([record["step"] for record in steps]),
        np.array([record["loss"] for record in steps]),
        evals[-1]["loss"] if evals else None,
        sum(counted) if counted else None,
    )


def relative(curve: Curve, base: Curve) -> tuple[np.ndarray, np.ndarray]:
    """(steps, smoothed loss over base's, less 1) of the steps that both have."""
    count = min(len(curve.steps), len(base.steps))
    return curve.steps[:count], curve.smoothed[:count] / base.smoothed[:count] - 1


def difference(curve: Curve, base: Curve) -> Difference:
    steps, apart = relative(curve, base)
    settled = apart[steps > SETTLED * steps[-1]]
    return Difference(curve.name, float(settled[-1]), float(settled.mean()),
                      float(np.abs(settled).max()))  # fmt: skip


def write_study(curves: Mapping[str, Curve], path: Path) -> Path:
    """Figures of all curves as JSON."""
    table = []
    for curve in curves.values():
        row = {
            "name": curve.name, "steps": int(curve.steps[-1]),
            "smoothed_loss": float(curve.smoothed[-1]), "held_out_loss": curve.held_out,
            "overflowed_tiles": curve.overflowed,
        }  # fmt: skip
        if BASE in curves and curve.name != BASE:
            apart = difference(curve, curves[BASE])
            row |= {"last": apart.last, "mean": apart.mean, "most": apart.most}
        table.append(row)
    path.write_text(json.dumps({"window": WINDOW, "settled": SETTLED, "runs": table}, indent=1))
    return path
