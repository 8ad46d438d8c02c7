"""run.py compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.table import Table

from dsjax.commands.folders import RUNS
from dsjax.commands.recipes import CONFIGS, load_recipe
from dsjax.commands.terminal import console


@dataclass(frozen=True)
class CompareCommand:
    """Train several recipes and draw their held-out loss against MaxVio_global."""

    recipes: tyro.conf.Positional[tuple[Path, ...]] = tuple(
        CONFIGS / f"{name}.py" for name in ("balance_bias", "balance_aux", "balance_aux_strong")
    )
    out: Path = RUNS / "compare"
    steps: int | None = None
    """Fewer or more steps than the recipes have."""


def run(arguments: list[str]) -> int:
    """Train what is not trained yet, print and draw; 0 also after a signal."""
    from dsjax.train import train
    from dsjax.train.plots import draw_comparison

    command = tyro.cli(CompareCommand, args=arguments, prog="run.py compare")
    table = Table("run", "held-out bits per byte", "loss", "MaxVio_global")
    folders = {}
    for path in command.recipes:
        recipe = load_recipe(path)
        if command.steps:
            recipe = replace(recipe, train=replace(recipe.train, steps=command.steps))
        folders[recipe.name] = command.out / recipe.name
        outcome = train(recipe, folders[recipe.name], resume=True, console=console)
        if outcome.stopped_by or outcome.evaluation is None:
            return 0
        result = outcome.evaluation
        table.add_row(recipe.name, f"{result.bits_per_byte:.3f}", f"{result.loss:.4f}",
                      f"{result.max_vio_global:.3f}")  # fmt: skip
    console.print(table)
    console.print(f"picture: {draw_comparison(folders, command.out / 'compare.png')}")
    return 0
