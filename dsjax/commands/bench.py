"""run.py bench gemm and run.py bench mla."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dsjax.commands import FAILED
from dsjax.commands.folders import RUNS
from dsjax.commands.terminal import console, hint_at_gpu, say


@dataclass(frozen=True)
class BenchGemmCommand:
    """Time the FP8 and BF16 matmuls beside XLA's, the card's ceilings and recorded DeepGEMM."""

    shapes: tuple[str, ...] = ()
    """MxNxK, or gGxMxNxK with M rows a group; each runs in every kind that takes its form. By
    default a list of DeepSeek-V3's."""
    kinds: tuple[Literal["dense", "grouped", "masked", "wgrad", "bf16"], ...] = (
        "dense", "grouped", "masked", "wgrad", "bf16",
    )  # fmt: skip
    out: Path = RUNS / "bench_gemm"
    """Folder of bench_gemm.json and roofline.png."""
    seconds: float = 0.1
    """Least time that one reading of a long call lasts; on a GPU its seven parts are 20 ms or
    more."""


@dataclass(frozen=True)
class BenchMlaCommand:
    """Time the attention kernels beside recorded FlashMLA, cuDNN and the card's ceilings."""

    shapes: tuple[str, ...] = ()
    """bBxsSxhHxtT for decode (S queries of each of B requests, T tokens in the cache), bBxsSxhHxkK
    for sparse decode of K tokens a query, bBxhHxtT for prefill; each runs in every chosen part that
    takes its form. By default the shapes of the recorded peers."""
    parts: tuple[Literal["decode", "ragged", "fp8", "prefill", "sparse"], ...] = (
        "decode", "ragged", "fp8", "prefill", "sparse",
    )  # fmt: skip
    out: Path = RUNS / "bench_mla"
    """Folder of bench_mla.json, flashmla.png and ceilings.png."""
    seconds: float = 0.1
    """Least time that one reading of a long call lasts; on a GPU its seven parts are 20 ms or
    more."""


def run(arguments: list[str]) -> int:
    """Time, print and draw; FAILED if a row is wrong or cannot run, ValueError for bad input."""
    from dsjax.bench import MlaSettings, Settings, run_gemm, run_mla

    command = tyro.extras.subcommand_cli_from_dict(
        {"gemm": BenchGemmCommand, "mla": BenchMlaCommand}, args=arguments, prog="run.py bench"
    )
    hint_at_gpu()
    if isinstance(command, BenchMlaCommand):
        settings = MlaSettings(command.shapes, command.parts, command.out, command.seconds)
        what, (outcome, written) = "rows", run_mla(settings, console)
    else:
        settings = Settings(command.shapes, command.kinds, command.out, command.seconds)
        what, (outcome, written) = "products", run_gemm(settings, console)
    if outcome.interrupted:
        say(f"stopped by Ctrl-C; {what} timed: {len(outcome.rows)}")
    say("wrote " + ", ".join(map(str, written)))
    return FAILED if any(row.failed for row in outcome.rows) else 0
