"""dsjax from the command line: train, generate, convert, info, tokenize, compare, bench.

Each sub-command parses, calls and prints; the work is done in the rooms of `dsjax/`. Bad input ends
with one line on stderr and exit code 2 (DSJAX_TRACEBACK=1 shows where it came from).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from dsjax.config import Model, Run

HERE = Path(__file__).parent
RUNS = Path("runs")
BAD_INPUT, FAILED = 2, 1
console = Console()


def say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


# --- recipes -------------------------------------------------------------------------------------


def load_recipe(path: Path) -> Run:
    """The `Run` that a recipe file's `recipe()` returns; ValueError if it is not such a file."""
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}: give a file such as configs/tiny.py")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: recipes are functions `recipe() -> Run`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        run = module.recipe() if hasattr(module, "recipe") else None
    except Exception as problem:  # whatever a user's file may raise
        raise ValueError(f"{path} cannot be used: {type(problem).__name__}: {problem}") from problem
    if not isinstance(run, Run):
        raise ValueError(f"{path} has no function recipe() that returns a dsjax.config.Run")
    return run


def take_recipe(arguments: list[str]) -> tuple[Run, list[str]]:
    """The recipe named first (tiny if none is) and the rest of the command line."""
    if arguments and not arguments[0].startswith("-"):
        return load_recipe(Path(arguments[0])), arguments[1:]
    return load_recipe(HERE / "configs" / "tiny.py"), arguments


# --- train ---------------------------------------------------------------------------------------


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


def train_command(arguments: list[str]) -> int:
    from dsjax.train import train, xz_bits_per_byte

    recipe, rest = take_recipe(arguments)
    command = tyro.cli(
        TrainCommand, args=rest, default=TrainCommand(recipe), prog="run.py train [RECIPE]"
    )
    out = command.out or default_folder(command.run.name, command.resume)
    hint_at_gpu()
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
        print_sample(out, command.sample)
    return 0


def default_folder(name: str, resume: bool) -> Path:
    """runs/NAME, or the first of NAME-2, NAME-3, ... that is free (the last one, to resume)."""
    number, folder = 1, RUNS / name
    while (following := folder_number(name, number)).exists():
        number, folder = number + 1, following
    return folder if resume else folder_number(name, number)


def folder_number(name: str, number: int) -> Path:
    return RUNS / (name if number == 1 else f"{name}-{number}")


def hint_at_gpu() -> None:
    if jax.default_backend() == "cpu" and Path("/proc/driver/nvidia/version").exists():
        console.print(
            "this machine has an NVIDIA driver but jax sees no GPU: install it with "
            "`python3 -m uv run --extra gpu run.py ...`",
            style="yellow",
        )


def print_sample(folder: Path, tokens: int) -> None:
    console.print("sample:")
    speak(folder, "def ", tokens, temperature=0.8, top_p=0.95, seed=0)


# --- generate ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt with a trained run or a published checkpoint."""

    model: Path
    """A run's folder, or one with config.json, safetensors and tokenizer.json."""
    prompt: str
    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Format of a published checkpoint's weights in memory."""
    chat: bool = False
    """Put the prompt through the checkpoint's chat template, as a user's message."""


def generate_command(arguments: list[str]) -> int:
    command = tyro.cli(GenerateCommand, args=arguments, prog="run.py generate")
    prompt = command.prompt
    if command.chat:
        from dsjax.hf import ChatTemplate

        message = {"role": "user", "content": prompt}
        template = ChatTemplate.from_folder(command.model)
        prompt = template.render([message], add_generation_prompt=True)
    speak(command.model, prompt, command.max_new_tokens, command.temperature, command.top_p,
          command.seed, command.dtype, special=command.chat)  # fmt: skip
    return 0


def speak(folder: Path, prompt: str, count: int, temperature: float, top_p: float, seed: int,
          dtype: str = "bfloat16", special: bool = False) -> None:  # fmt: skip
    """Print the prompt and its continuation as it comes, up to the end of the document."""
    from dsjax.data import StreamDecoder
    from dsjax.infer import stream

    model, tokenizer = load_model(folder, dtype)
    tokens = tokenizer.encode(prompt, parse_special=special)
    if not len(tokens):
        raise ValueError("the prompt is empty: give at least one character")
    decoder = StreamDecoder(tokenizer)
    print(prompt, end="", flush=True)
    for token in stream(model, tokens, count, temperature, top_p, seed):
        if int(token[0]) == tokenizer.eod:
            break
        print(decoder.push(int(token[0])), end="", flush=True)
    print(decoder.finish())


def load_model(folder: Path, dtype: str):
    """Model and tokenizer of a published checkpoint or of a run."""
    from dsjax.data import load_tokenizer

    if (folder / "config.json").is_file():
        from dsjax.hf import from_pretrained

        tokenizer = load_tokenizer(str(folder))
        return from_pretrained(folder, dtype=dtype), tokenizer
    from dsjax.train.restore import load_run

    return load_run(folder)


# --- convert -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvertCommand:
    """Write a checkpoint in the published format (config.json and safetensors).

    The source is a run's folder or a published checkpoint, FP8 ones included: FP8 stays FP8, bit
    for bit, unless --dtype asks for another format.
    """

    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]
    dtype: Literal["keep", "bfloat16", "float32", "fp8"] = "keep"


def convert_command(arguments: list[str]) -> int:
    from dsjax.hf import save_pretrained

    command = tyro.cli(ConvertCommand, args=arguments, prog="run.py convert")
    published = (command.source / "config.json").is_file()
    dtype = None if command.dtype == "keep" else command.dtype
    if published:
        model, tokenizer_from = load_published(command.source, command.dtype), command.source
    else:
        from dsjax.train.restore import load_run

        model, _ = load_run(command.source)
        tokenizer_from = command.source if (command.source / "tokenizer.json").is_file() else None
        dtype = dtype or "bfloat16"
    save_pretrained(model, command.target, dtype=dtype, tokenizer_from=tokenizer_from)
    say(f"wrote {command.target}")
    return 0


def load_published(folder: Path, dtype: str):
    from dsjax.hf import from_pretrained, stored_dtype

    own = dtype in ("keep", "fp8")
    return from_pretrained(folder, dtype=stored_dtype(folder) if own else dtype)


# --- info ----------------------------------------------------------------------------------------


def info_command(arguments: list[str]) -> int:
    from dsjax.model.sizes import measure, training_work

    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise ValueError(f"info takes one recipe or checkpoint folder, not {' '.join(arguments)}")
    if arguments and Path(arguments[0]).is_dir():
        from dsjax.hf import read_config

        name, model, seq_len = arguments[0], read_config(Path(arguments[0])), 4096
    else:
        run, _ = take_recipe(arguments)
        name, model, seq_len = run.name, run.model, run.data.seq_len
    sizes, work = measure(model), training_work(model, seq_len)
    table = Table(title=name, show_header=False)
    rows = [
        ("parameters", billions(sizes.total)),
        ("active a token", f"{billions(sizes.active)} (the embedding is a look-up)"),
        ("MTP, its own", f"{billions(sizes.mtp)} ({billions(sizes.mtp - sizes.mtp_projection)} "
                         "without the projection, as the report counts)"),
        ("MTP, active", f"{billions(sizes.mtp_active - sizes.mtp_projection)} with the shared "
                        "embedding and head"),
        ("latent cache, bf16", f"{sizes.cache_bytes:,} bytes a token"),
        ("training work", f"{work.causal / 1e9:,.2f} GFLOP a token at {seq_len} tokens (causal; "
                          f"{work.full / 1e9:,.2f} with full attention)"),
        ("layers", f"{model.layers}, {model.dense_layers} of them dense"),
        ("experts", experts_line(model)),
    ]  # fmt: skip
    for row in rows:
        if model.mtp_depth or not row[0].startswith("MTP"):
            table.add_row(*row)
    console.print(table)
    return 0


def experts_line(model: Model) -> str:
    groups = f"; {model.top_groups} of {model.groups} groups" if model.groups > 1 else ""
    return f"{model.top_k} of {model.experts} routed, {model.shared_experts} shared{groups}"


def billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"


# --- tokenize and compare ------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizeCommand:
    """Train a byte-level BPE tokenizer on a corpus."""

    out: Path
    """Where tokenizer.json goes."""
    paths: tuple[str, ...] = ()
    """Files, folders or globs; empty for Python's standard library."""
    vocab_size: int = 4096
    text_field: str = "text"


def tokenize_command(arguments: list[str]) -> int:
    from dsjax.data import read_corpus, train_bpe

    command = tyro.cli(TokenizeCommand, args=arguments, prog="run.py tokenize")
    corpus = read_corpus(command.paths, command.text_field)
    tokenizer = train_bpe(corpus.documents, command.vocab_size, command.out)
    say(f"wrote {command.out}: {tokenizer.vocab_size} tokens")
    return 0


@dataclass(frozen=True)
class CompareCommand:
    """Train several recipes and draw their held-out loss against MaxVio_global."""

    recipes: tyro.conf.Positional[tuple[Path, ...]] = tuple(
        HERE / "configs" / f"{name}.py"
        for name in ("balance_bias", "balance_aux", "balance_aux_strong")
    )
    out: Path = RUNS / "compare"
    steps: int | None = None
    """Fewer or more steps than the recipes have."""


def compare_command(arguments: list[str]) -> int:
    from dsjax.train import train
    from dsjax.train.plots import draw_comparison

    command = tyro.cli(CompareCommand, args=arguments, prog="run.py compare")
    table = Table("run", "held-out bits per byte", "loss", "MaxVio_global")
    folders = {}
    for path in command.recipes:
        run = load_recipe(path)
        if command.steps:
            run = replace(run, train=replace(run.train, steps=command.steps))
        folders[run.name] = command.out / run.name
        outcome = train(run, folders[run.name], resume=True, console=console)
        if outcome.stopped_by or outcome.evaluation is None:
            return 0
        result = outcome.evaluation
        table.add_row(run.name, f"{result.bits_per_byte:.3f}", f"{result.loss:.4f}",
                      f"{result.max_vio_global:.3f}")  # fmt: skip
    console.print(table)
    console.print(f"picture: {draw_comparison(folders, command.out / 'compare.png')}")
    return 0


# --- bench ---------------------------------------------------------------------------------------


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


def bench_command(arguments: list[str]) -> int:
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


COMMANDS = {
    "train": train_command,
    "generate": generate_command,
    "convert": convert_command,
    "info": info_command,
    "tokenize": tokenize_command,
    "compare": compare_command,
    "bench": bench_command,
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        usage = f"usage: run.py {{{','.join(COMMANDS)}}} ... (-h after one for its options)"
        print(f"{__doc__}\n{usage}",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        return 0 if asked else BAD_INPUT
    keep_compiled_programs()
    try:
        return COMMANDS[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    except (ValueError, OSError, RuntimeError) as problem:
        if os.environ.get("DSJAX_TRACEBACK"):
            raise
        print(f"error: {problem}", file=sys.stderr)
        return BAD_INPUT if isinstance(problem, ValueError | OSError) else FAILED


def keep_compiled_programs() -> None:
    """Compile each program once a machine, unless the environment says where or not to."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "dsjax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
