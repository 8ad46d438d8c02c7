"""Tokenizers: raw bytes, or a byte-level BPE from a tokenizer.json.

Both kinds know the bytes of every token, so decoding is the same few lines for both and a stream
of tokens turns into text without ever showing half a character. Text is never searched for
special tokens unless the caller asks: a document that spells one cannot end itself.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.data.corpus import Document

# DeepSeek's spelling first, then that of the tokenizers trained here.
_NAMES = {
    "eod": ("<｜end▁of▁sentence｜>", "<|end_of_document|>"),
    "fim_begin": ("<｜fim▁begin｜>", "<|fim_begin|>"),
    "fim_hole": ("<｜fim▁hole｜>", "<|fim_hole|>"),
    "fim_end": ("<｜fim▁end｜>", "<|fim_end|>"),
}
_BATCH = 256  # texts encoded at once: what is in flight stays small beside the corpus


class Tokenizer(ABC):
    """What packing, training and generation ask of a tokenizer."""

    vocab_size: int
    eod: int
    """Ends a document, and generation."""
    fim_begin: int | None
    fim_hole: int | None
    fim_end: int | None

    @abstractmethod
    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Tokens of a text; special tokens spelled in it count as such only on request."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        """One int array a text, special tokens taken as plain text."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one token; nothing for special tokens and for ids beyond the vocabulary."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, U+FFFD where they are not UTF-8; ValueError for a negative id."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def fim_tokens(self) -> tuple[int, int, int]:
        """Ids of begin, hole and end; ValueError if this tokenizer has none."""
        if self.fim_begin is None or self.fim_hole is None or self.fim_end is None:
            wanted = [_NAMES[name] for name in ("fim_begin", "fim_hole", "fim_end")]
            raise ValueError(f"this tokenizer lacks tokens of {wanted}: set fim_rate to 0")
        return self.fim_begin, self.fim_hole, self.fim_end


class ByteTokenizer(Tokenizer):
    """Tokens 0 to 255 are the bytes of UTF-8; the special tokens follow and have no spelling."""

    eod, fim_begin, fim_hole, fim_end = 256, 257, 258, 259
    vocab_size = 260

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def token_bytes(self, token: int) -> bytes:
        _check_token(token)
        return bytes((token,)) if token < 256 else b""


class JsonTokenizer(Tokenizer):
    """A byte-level tokenizer.json, DeepSeek's or one trained here; ValueError if it is neither."""

    def __init__(self, path: str | Path) -> None:
        self._json, self._text = _open(Path(path))
        self.path = Path(path)
        if not isinstance(self._text.decoder, decoders.ByteLevel):
            raise ValueError(f"{path}: its decoder is not ByteLevel; give a byte-level BPE")
        self.vocab_size = max(self._text.get_vocab().values(), default=-1) + 1
        ids = {kind: self._find(names) for kind, names in _NAMES.items()}
        if ids["eod"] is None:
            raise ValueError(f"{path}: no end-of-document token, none of {_NAMES['eod']}")
        self.eod = ids["eod"]
        self.fim_begin, self.fim_hole, self.fim_end = (
            ids[name] for name in ("fim_begin", "fim_hole", "fim_end")
        )

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        tokenizer = self._parser if parse_special else self._text
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " n"]]:
        encoded: list[np.ndarray] = []
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            results = self._text.encode_batch_fast(part, add_special_tokens=False)
            encoded += [np.asarray(result.ids, np.uint32) for result in results]
        return encoded

    def token_bytes(self, token: int) -> bytes:
        _check_token(token)
        return self._bytes[token] if token < self.vocab_size else b""

    def _find(self, names: Iterable[str]) -> int | None:
        ids = (self._text.token_to_id(name) for name in names)
        return next((token for token in ids if token is not None), None)

    @cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._json)

    @cached_property
    def _bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        alphabet = _byte_alphabet()
        for spelling, token in self._text.get_vocab(with_added_tokens=False).items():
            table[token] = b"".join(alphabet.get(c) or c.encode() for c in spelling)
        for token, added in self._parser.get_added_tokens_decoder().items():
            table[token] = b"" if added.special else added.content.encode()
        return table


class StreamDecoder:
    """Text of a growing answer, token by token, whole characters only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, often one and at times none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """U+FFFD if the stream broke off inside a character; the decoder then starts afresh."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, a tokenizer.json or a folder that holds one; ValueError for anything else."""
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"tokenizer {spec!r}: no file {path}; give `bytes` or a tokenizer.json")
    return JsonTokenizer(path)


def train_bpe(
    documents: Iterable[Document], vocab_size: int, out_path: str | Path
) -> JsonTokenizer:
    """Train a byte-level BPE and write it; a small text may yield fewer tokens than asked for."""
    special = [names[-1] for names in _NAMES.values()]
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}: bytes and special tokens take {smallest}")
    path = Path(out_path)
    if path.suffix != ".json":
        raise ValueError(f"out_path is {str(path)!r}: a tokenizer is written as a .json file")
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(_byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return JsonTokenizer(path)


def _untrained() -> tokenizers.Tokenizer:
    """Digits go in threes from the left, as in V3; words and spaces split as in GPT-2."""
    digits = pre_tokenizers.Split(tokenizers.Regex(r"\p{N}{1,3}"), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _open(path: Path) -> tuple[str, tokenizers.Tokenizer]:
    """The file's JSON as it is, and a tokenizer from it to which all text is plain."""
    try:
        raw = path.read_text(encoding="utf-8")
        plain = json.loads(raw)
        # The library can ignore only what is marked special; DeepSeek leaves some unmarked.
        for added in plain.get("added_tokens") or ():
            added["special"] = True
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from error
    tokenizer.encode_special_tokens = True
    return raw, tokenizer


def _check_token(token: int) -> None:
    if token < 0:
        raise ValueError(f"token {token}: ids start at 0")


def _byte_alphabet() -> dict[str, bytes]:
    """The printable characters that stand for bytes in a byte-level vocabulary (GPT-2)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in plain]
    characters = {chr(byte): bytes((byte,)) for byte in plain}
    return characters | {chr(256 + i): bytes((byte,)) for i, byte in enumerate(moved)}
