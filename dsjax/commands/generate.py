"""run.py generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


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


def run(arguments: list[str]) -> int:
    """Print the continuation; ValueError for bad input."""
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
    """Print the prompt and its continuation as it comes, up to the end of the document.

    ValueError for an empty prompt and for one with its continuation beyond the context.
    """
    from dsjax.data import StreamDecoder
    from dsjax.infer import stream

    model, tokenizer = _load(folder, dtype)
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


def _load(folder: Path, dtype: str):
    """Model and tokenizer of a published checkpoint or of a run."""
    from dsjax.data import load_tokenizer

    if (folder / "config.json").is_file():
        from dsjax.hf import from_pretrained

        tokenizer = load_tokenizer(str(folder))
        return from_pretrained(folder, dtype=dtype), tokenizer
    from dsjax.train.restore import load_run

    return load_run(folder)
