"""run.py precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from dsjax.commands.folders import RUNS
from dsjax.commands.recipes import take_recipe
from dsjax.commands.terminal import console, hint_at_gpu, say
from dsjax.config import Run
from dsjax.train.study import BASE, Curve, difference, read_curve, variant, write_study

Variant = Literal[
    "bf16", "bf16_again", "bf16_other_seed", "bf16_other_weights",
    "fp8", "fp8_unpromoted", "fp8_gradient_blocks",
]  # fmt: skip


@dataclass(frozen=True)
class PrecisionCommand:
    """Train a recipe in BF16, in FP8 and in FP8 made worse, and compare the losses.

    run.py precision [configs/NAME.py] [options]. Variants that are done are not trained again.
    """

    run: Annotated[Run, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    variants: tuple[Variant, ...] = (
        "bf16", "bf16_again", "bf16_other_seed", "bf16_other_weights",
        "fp8", "fp8_unpromoted", "fp8_gradient_blocks",
    )  # fmt: skip
    """fp8_unpromoted keeps 13 bits of sums from one 128 of K to the next, as the tensor core would;
    fp8_gradient_blocks has a scale for 128 x 128 of gradients."""
    out: Path | None = None
    """Folder of the runs, study.json and study.png; by default runs/precision_NAME."""


def run(arguments: list[str]) -> int:
    """Train what is not trained yet, print and draw; 0 also after a signal."""
    from dsjax.train.study_picture import draw_study

    recipe, rest = take_recipe(arguments)
    command = tyro.cli(
        PrecisionCommand, args=rest, default=PrecisionCommand(recipe),
        prog="run.py precision [RECIPE]",
    )  # fmt: skip
    out = command.out or RUNS / f"precision_{command.run.name}"
    hint_at_gpu()
    for name in command.variants:
        stopped_by = _train(variant(command.run, name), out / name)
        if stopped_by:
            say(f"stopped by {stopped_by}; the same command goes on")
            return 0
    found = {name: read_curve(out / name, name) for name in command.variants}
    curves: dict[str, Curve] = {name: curve for name, curve in found.items() if curve is not None}
    console.print(_table(curves))
    written = [write_study(curves, out / "study.json"), draw_study(curves, out / "study.png")]
    say("wrote " + ", ".join(map(str, written)))
    return 0


def _train(run: Run, folder: Path) -> str | None:
    """Train one variant to its end, unless it is there; the name of the signal that came."""
    from dsjax.train import Diverged, train

    curve = read_curve(folder, run.name)
    if curve and curve.steps[-1] == run.train.steps and curve.held_out is not None:
        say(f"variant {run.name} is done")
        return None
    say(f"variant {run.name} in {folder}")
    try:
        return train(run, folder, resume=True, console=console).stopped_by
    except Diverged as problem:  # what a departure may come to: its curve ends there
        say(f"variant {run.name} ended: {problem}")
        return None


def _table(curves: Mapping[str, Curve]) -> Table:
    table = Table("run", "training loss", "held out", "from bf16: last", "mean", "most")
    for curve in curves.values():
        apart = ["", "", ""]
        if BASE in curves and curve.name != BASE:
            found = difference(curve, curves[BASE])
            apart = [f"{x:+.3%}" for x in (found.last, found.mean)] + [f"{found.most:.3%}"]
        held_out = "" if curve.held_out is None else f"{curve.held_out:.4f}"
        table.add_row(curve.name, f"{curve.smoothed[-1]:.4f}", held_out, *apart)
    return table
