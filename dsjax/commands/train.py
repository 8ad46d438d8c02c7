"""run.py train."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsjax.commands.folders import default_folder
from dsjax.commands.recipes import take_recipe
from dsjax.commands.terminal import console, hint_at_gpu, hint_at_simulated_fp8, say
from dsjax.config import Run
from dsjax.parallel.multihost import failing_fast, start


@dataclass(frozen=True)
class TrainCommand:
    """Train a recipe: run.py train [configs/NAME.py] [options]."""

    run: Annotated[Run, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    out: Path | None = None
    """Folder of the run; by default runs/NAME, or runs/NAME-2 and so on if that is taken."""
    resume: bool = False
    """Go on from the newest good checkpoint of --out (or of the newest runs/NAME...)."""
    sample: int = 200
    """Length in tokens of the text printed at the end; 0 for none."""


def run(arguments: list[str]) -> int:
    """Train, and say how it ended: 0, also after a signal. ValueError for bad input.

    Of several processes each takes part, and the first one speaks.
    """
    recipe, rest = take_recipe(arguments)
    command = tyro.cli(
        TrainCommand, args=rest, default=TrainCommand(recipe), prog="run.py train [RECIPE]"
    )
    launch = start()
    if launch.count > 1:
        say(str(launch))
    console.quiet = launch.index > 0
    with failing_fast():
        return _train(command)


def _train(command: TrainCommand) -> int:
    from dsjax.train import train, xz_bits_per_byte

    out = command.out or default_folder(command.run.name, command.resume)
    hint_at_gpu()
    hint_at_simulated_fp8(command.run.precision)
    say(f"run {command.run.name} in {out}")
    outcome = train(command.run, out, resume=command.resume, console=console)
    if outcome.stopped_by:
        say(
            f"stopped by {outcome.stopped_by} after step {outcome.step}; go on with: "
            f"run.py train ... --out {out} --resume"
        )
        return 0
    if outcome.evaluation is None:
        raise ValueError(f"{out} ended at step {outcome.step} without an evaluation")
    bits, xz = outcome.evaluation.bits_per_byte, xz_bits_per_byte(command.run)
    say(
        f"held out: {bits:.3f} bits per byte (xz -9 of the same text: {xz:.3f}), "
        f"MaxVio_global {outcome.evaluation.max_vio_global:.3f}"
    )
    say("pictures: " + ", ".join(map(str, outcome.pictures)))
    if command.sample:
        _print_sample(out, command.sample)
    return 0


def _print_sample(folder: Path, tokens: int) -> None:
    """All processes read the checkpoint together, and one shows what it makes of it."""
    from dsjax.commands.generate import speak

    console.print("sample:")
    with redirect_stdout(None if console.quiet else sys.stdout):
        speak(folder, "def ", tokens, temperature=0.8, top_p=0.95, seed=0)
