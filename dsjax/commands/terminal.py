"""What every command prints with."""

from pathlib import Path

import jax
from rich.console import Console

from pallas_kernels.device import is_hopper

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


def hint_at_simulated_fp8(precision: str) -> None:
    """Say that FP8 is slow where there are no kernels for it."""
    if precision == "fp8" and not is_hopper():
        console.print(
            "FP8 is simulated here, slowly: its kernels need a Hopper GPU (H100, H200); "
            "--precision bf16 does without",
            style="yellow",
        )
