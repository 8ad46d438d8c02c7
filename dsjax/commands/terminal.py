"""What every command prints with."""

from pathlib import Path

import jax
from rich.console import Console

console = Console()


def say(text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, highlight=False, soft_wrap=True)


def hint_at_gpu() -> None:
    """Say how to use a GPU that this machine has and jax does not see."""
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia/version").exists():
        console.print(
            "this machine has an NVIDIA driver but jax sees no GPU: install it with "
            "`python3 -m uv run --extra gpu run.py ...`",
            style="yellow",
        )
