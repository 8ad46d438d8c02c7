"""run.py convert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dsjax.commands.terminal import say


@dataclass(frozen=True)
class ConvertCommand:
    """Write a checkpoint in the published format (config.json and safetensors).

    The source is a run's folder or a published checkpoint, FP8 ones included: FP8 stays FP8, bit
    for bit, unless --dtype asks for another format.
    """

    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]
    dtype: Literal["keep", "bfloat16", "float32", "fp8"] = "keep"


def run(arguments: list[str]) -> int:
    """Write the checkpoint; ValueError for a source that is none."""
    from dsjax.hf import save_pretrained

    command = tyro.cli(ConvertCommand, args=arguments, prog="run.py convert")
    published = (command.source / "config.json").is_file()
    dtype = None if command.dtype == "keep" else command.dtype
    if published:
        model, tokenizer_from = _load_published(command.source, command.dtype), command.source
    else:
        from dsjax.train.restore import load_run

        model, _ = load_run(command.source)
        tokenizer_from = command.source if (command.source / "tokenizer.json").is_file() else None
        dtype = dtype or "bfloat16"
    save_pretrained(model, command.target, dtype=dtype, tokenizer_from=tokenizer_from)
    say(f"wrote {command.target}")
    return 0


def _load_published(folder: Path, dtype: str):
    from dsjax.hf import from_pretrained, stored_dtype

    own = dtype in ("keep", "fp8")
    return from_pretrained(folder, dtype=stored_dtype(folder) if own else dtype)
