"""Where a command writes unless it is told."""

from pathlib import Path

RUNS = Path("runs")


def default_folder(name: str, resume: bool) -> Path:
    """runs/NAME, or the first of NAME-2, NAME-3, ... that is free (the last one, to resume)."""
    number, folder = 1, RUNS / name
    while (following := _numbered(name, number)).exists():
        number, folder = number + 1, following
    return folder if resume else _numbered(name, number)


def _numbered(name: str, number: int) -> Path:
    return RUNS / (name if number == 1 else f"{name}-{number}")
