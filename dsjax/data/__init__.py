"""Text to batches: corpus, tokenizer, packing, stream.

Every step is a pure function of its settings and a seed, so a run resumes at any step, on any
number of hosts, with the batches it would have seen.
"""

from dsjax.data.corpus import Corpus, Document, held_out_text, read_corpus, split_documents
from dsjax.data.packing import Packed, Sequences, load_corpus_tokens, pack
from dsjax.data.stream import TrainStream, batch_offset, batch_size, eval_batches
from dsjax.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "Document",
    "JsonTokenizer",
    "Packed",
    "Sequences",
    "StreamDecoder",
    "Tokenizer",
    "TrainStream",
    "batch_offset",
    "batch_size",
    "eval_batches",
    "held_out_text",
    "load_corpus_tokens",
    "load_tokenizer",
    "pack",
    "read_corpus",
    "split_documents",
    "train_bpe",
]
