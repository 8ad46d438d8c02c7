"""Progress for people: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 20
"""Lines a whole run prints when the output is not a terminal."""


class TrainProgress:
    def __init__(self, console: Console, start: int, steps: int):
        self._console, self._steps = console, steps
        self._every = max(steps // LINES, 1)
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=steps, completed=start, figures="compiling")

    def __enter__(self) -> TrainProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, values: dict[str, Any]) -> None:
        figures = (
            f"loss {values['loss']:.3f}  MaxVio {values['max_vio']:.2f}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        if values.get("mfu"):
            figures += f"  MFU {values['mfu']:.1%}"
        self._bar.update(self._task, completed=step, figures=figures)
        if not self._console.is_terminal and (step % self._every == 0 or step == 1):
            self._console.print(
                f"step {step}/{self._steps}  {figures}", highlight=False, soft_wrap=True
            )

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
