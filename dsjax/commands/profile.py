"""run.py profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsjax.commands.folders import RUNS
from dsjax.commands.recipes import take_recipe
from dsjax.commands.terminal import console, hint_at_gpu, hint_at_simulated_fp8, say
from dsjax.config import Run


@dataclass(frozen=True)
class ProfileCommand:
    """Measure a few training steps of a recipe: speed, memory, and where the time goes.

    run.py profile [configs/NAME.py] [options]
    """

    run: Annotated[Run, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    steps: int = 3
    """Steps that are timed by the clock; as many are traced after them."""
    out: Path | None = None
    """Folder of profile.json and profile.png; by default runs/profile_NAME."""
    top: int = 20
    """Longest operations that are printed; profile.json has all."""


def run(arguments: list[str]) -> int:
    """Measure, print, write and draw; ValueError for what no run could train on."""
    from dsjax.train.profile import profile
    from dsjax.train.profile_picture import draw
    from dsjax.train.profile_report import JSON, print_report, write_json

    recipe, rest = take_recipe(arguments)
    command = tyro.cli(
        ProfileCommand, args=rest, default=ProfileCommand(recipe), prog="run.py profile [RECIPE]"
    )
    if command.top < 1:
        raise ValueError(f"top is {command.top}: print at least 1 operation")
    out = command.out or RUNS / f"profile_{command.run.name}"
    hint_at_gpu()
    hint_at_simulated_fp8(command.run.precision)
    out.mkdir(parents=True, exist_ok=True)
    found = profile(command.run, command.steps, say)
    print_report(console, found, command.top)
    written = [write_json(out / JSON, found), draw(found, out / "profile.png")]
    say("wrote " + ", ".join(map(str, written)))
    return 0
