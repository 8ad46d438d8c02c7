"""run.py bench gemm, mla, training and exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from dsjax.commands import FAILED
from dsjax.commands.folders import RUNS
from dsjax.commands.terminal import console, hint_at_gpu, say

if TYPE_CHECKING:
    from dsjax.bench.rows import Outcome


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


@dataclass(frozen=True)
class BenchTrainingCommand:
    """Time a training step's casts, SwiGLU, permutation and head beside XLA's own way and the
    card's ceilings."""

    parts: tuple[Literal["casts", "swiglu", "permute", "head"], ...] = (
        "casts", "swiglu", "permute", "head",
    )  # fmt: skip
    tokens: int = 32768
    """Of a batch. This and the sizes below are DeepSeek-V2-Lite's by default."""
    batch: int = 8
    """Sequences that the tokens make up."""
    dim: int = 2048
    experts: int = 64
    top_k: int = 6
    """Experts of a token."""
    expert_hidden: int = 1408
    shared_hidden: int = 2816
    """Width of the shared experts together."""
    vocab_size: int = 102400
    out: Path = RUNS / "bench_training"
    """Folder of bench_training.json and training.png."""
    seconds: float = 0.1
    """Least time that one reading of a long call lasts; on a GPU its seven parts are 20 ms or
    more."""


@dataclass(frozen=True)
class BenchExchangeCommand:
    """Time expert dispatch and combine between the GPUs of a host beside XLA's collectives and the
    links' ceilings."""

    parts: tuple[
        Literal["links", "layout", "dispatch", "combine", "overlap", "low_latency"], ...
    ] = ("links", "layout", "dispatch", "combine", "overlap", "low_latency")
    tokens: int = 4096
    """Of a device; at low latency 128, or these if they are fewer. This and the sizes below are
    DeepSeek-V3's by default."""
    dim: int = 7168
    experts: int = 256
    """Of all devices together."""
    top_k: int = 8
    """Experts of a token."""
    ctas: tuple[int, ...] = (0,)
    """SMs that a kernel may take, such as 16 32, a row each; 0 leaves it to the kernel."""
    rounds: int = 0
    """Of a soak after the rows: ever other tokens and routings, every row checked."""
    out: Path = RUNS / "bench_exchange"
    """Folder of bench_exchange.json and exchange.png."""
    seconds: float = 0.1
    """Least time that seven readings of a call last; on a GPU each is about 20 ms or more."""


Command = BenchGemmCommand | BenchMlaCommand | BenchTrainingCommand | BenchExchangeCommand
COMMANDS: dict[str, Callable[..., Command]] = {
    "gemm": BenchGemmCommand, "mla": BenchMlaCommand, "training": BenchTrainingCommand,
    "exchange": BenchExchangeCommand,
}  # fmt: skip


def run(arguments: list[str]) -> int:
    """Time, print and draw; FAILED if a row is wrong or cannot run, ValueError for bad input."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="run.py bench")
    hint_at_gpu()
    what, (outcome, written) = _run(command)
    if outcome.interrupted:
        say(f"stopped by Ctrl-C; {what} timed: {len(outcome.rows)}")
    say("wrote " + ", ".join(map(str, written)))
    return FAILED if any(row.failed for row in outcome.rows) else 0


def _run(command: Command) -> tuple[str, tuple[Outcome, list[Path]]]:
    """What its rows are called, and what it found and wrote."""
    from dsjax import bench

    where = command.out, command.seconds
    if isinstance(command, BenchGemmCommand):
        settings = bench.Settings(command.shapes, command.kinds, *where)
        return "products", bench.run_gemm(settings, console)
    if isinstance(command, BenchMlaCommand):
        settings = bench.MlaSettings(command.shapes, command.parts, *where)
        return "rows", bench.run_mla(settings, console)
    if isinstance(command, BenchExchangeCommand):
        return "rows", _run_exchange(command)
    sizes = bench.Sizes(
        command.tokens, command.batch, command.dim, command.experts, command.top_k,
        command.expert_hidden, command.shared_hidden, command.vocab_size,
    )  # fmt: skip
    settings = bench.TrainingSettings(command.parts, sizes, *where)
    return "rows", bench.run_training(settings, console)


def _run_exchange(command: BenchExchangeCommand) -> tuple[Outcome, list[Path]]:
    from dsjax.bench.exchange import ExchangeSettings
    from dsjax.bench.exchange_loops import AXIS
    from dsjax.bench.exchange_report import run_exchange
    from dsjax.bench.exchange_shapes import Sizes
    from dsjax.parallel.nvlink import NvLink

    def layouts(ranks: int, room: float | None) -> NvLink:
        return NvLink(AXIS, ranks, room=room)

    sizes = Sizes(command.tokens, command.dim, command.experts, command.top_k)
    where = command.out, command.seconds
    settings = ExchangeSettings(layouts, command.parts, sizes, command.ctas, command.rounds, *where)
    return run_exchange(settings, console)
