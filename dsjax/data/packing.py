"""Documents to one flat array of tokens, and the array to sequences.

Documents are laid end to end, each closed by an end-of-document token; sequences are cut from the
array without padding and without a mask between documents, as V3 trains (arXiv 2412.19437,
section 4.1). A share of the training documents is first rearranged for fill-in-the-middle:

    fim_begin prefix fim_hole suffix fim_end middle eod
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, UInt

from dsjax import config
from dsjax.data.corpus import Document, read_corpus, split_documents
from dsjax.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, eq=False)
class Packed:
    """Tokens of many documents end to end, and how many bytes of UTF-8 their text takes."""

    tokens: UInt[np.ndarray, " n"]
    text_bytes: int

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {self.tokens.dtype}{list(self.tokens.shape)}: give a row of integers"
            )


def pack(
    documents: Sequence[Document], tokenizer: Tokenizer, *, fim_rate: float = 0.0, seed: int = 0
) -> Packed:
    """Encode and join documents; document i is rearranged by (seed, i) alone, at rate `fim_rate`.

    ValueError if there is no document, or if the tokenizer lacks the tokens that FIM needs.
    """
    if not documents:
        raise ValueError("there are 0 documents to pack: at least one is needed")
    if not 0 <= fim_rate <= 1:
        raise ValueError(f"fim_rate is {fim_rate}: it must lie between 0 and 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must be 0 or more")
    pieces = _pieces(documents, tokenizer, fim_rate, seed)
    text_bytes = sum(len(document.text.encode()) for document in documents)
    return Packed(_join(pieces, tokenizer), text_bytes)


class Sequences:
    """Packed tokens seen as records of seq_len + 1 tokens, a stride of seq_len apart.

    Inputs are record[:-1] and targets record[1:], so all but the last few tokens are a target once
    an epoch. ValueError if not even one record fits.
    """

    def __init__(self, packed: Packed, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}: it must be at least 1")
        if len(packed.tokens) < seq_len + 1:
            raise ValueError(
                f"seq_len={seq_len} takes {seq_len + 1} tokens and the corpus has only "
                f"{len(packed.tokens)}: use a shorter seq_len or more text"
            )
        self._tokens, self._seq_len = packed.tokens, seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, index: int) -> Int32[np.ndarray, " t+1"]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        start = index * self._seq_len
        return self._tokens[start : start + self._seq_len + 1].astype(np.int32)


def load_corpus_tokens(data: config.Data, seed: int) -> tuple[Packed, Packed, Tokenizer]:
    """Read, split and pack a corpus: train tokens (with FIM), held-out tokens, the tokenizer."""
    tokenizer = load_tokenizer(data.tokenizer)
    documents = read_corpus(data.paths, data.text_field).documents
    train, held_out = split_documents(documents, data.held_out)
    packed = pack(train, tokenizer, fim_rate=data.fim_rate, seed=seed)
    return packed, pack(held_out, tokenizer), tokenizer


def _pieces(
    documents: Sequence[Document], tokenizer: Tokenizer, fim_rate: float, seed: int
) -> list[str | int]:
    """Texts still to be encoded, between the special tokens around them."""
    fim = tokenizer.fim_tokens() if fim_rate > 0 else None
    pieces: list[str | int] = []
    for index, document in enumerate(documents):
        cuts = _fim_cuts(document.text, fim_rate, (seed, index)) if fim else None
        if fim and cuts:
            first, second = cuts
            text = document.text
            pieces += [fim[0], text[:first], fim[1], text[second:], fim[2], text[first:second]]
        else:
            pieces.append(document.text)
        pieces.append(tokenizer.eod)
    return pieces


def _fim_cuts(text: str, fim_rate: float, key: tuple[int, int]) -> tuple[int, int] | None:
    """Where the middle of a document begins and ends, or None if it keeps its order."""
    rng = np.random.default_rng(key)
    if rng.random() >= fim_rate:
        return None
    first, second = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    return first, second


def _join(pieces: Sequence[str | int], tokenizer: Tokenizer) -> UInt[np.ndarray, " n"]:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    texts = iter(tokenizer.encode_batch([piece for piece in pieces if isinstance(piece, str)]))
    arrays = [
        next(texts) if isinstance(piece, str) else np.array([piece], dtype) for piece in pieces
    ]
    return np.concatenate(arrays, dtype=dtype, casting="unsafe")
