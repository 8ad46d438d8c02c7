"""run.py tokenize."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from dsjax.commands.terminal import say


@dataclass(frozen=True)
class TokenizeCommand:
    """Train a byte-level BPE tokenizer on a corpus."""

    out: Path
    """Where tokenizer.json goes."""
    paths: tuple[str, ...] = ()
    """Files, folders or globs; empty for Python's standard library."""
    vocab_size: int = 4096
    text_field: str = "text"


def run(arguments: list[str]) -> int:
    """Write the tokenizer; ValueError for a corpus or a size that does not do."""
    from dsjax.data import read_corpus, train_bpe

    command = tyro.cli(TokenizeCommand, args=arguments, prog="run.py tokenize")
    corpus = read_corpus(command.paths, command.text_field)
    tokenizer = train_bpe(corpus.documents, command.vocab_size, command.out)
    say(f"wrote {command.out}: {tokenizer.vocab_size} tokens")
    return 0
