import numpy as np
import pytest

from dsjax import config
from dsjax.data.corpus import Document, held_out_text
from dsjax.data.packing import Packed, Sequences, load_corpus_tokens, pack
from dsjax.data.tokenizer import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()
DOCUMENTS = [Document(str(i), f"Größe {i}\n" * (i % 7 + 1)) for i in range(200)]


def _parts(tokens):
    """Token lists of the documents in a packed array, without their eod."""
    ends = np.flatnonzero(tokens == BYTES.eod)
    assert ends[-1] == len(tokens) - 1
    return [part.tolist()[:-1] for part in np.split(tokens, ends + 1)[:-1]]


def _restore(part):
    """The text of one document, and whether it was rearranged."""
    if part[:1] != [BYTES.fim_begin]:
        return BYTES.decode(part), False
    hole, end = part.index(BYTES.fim_hole), part.index(BYTES.fim_end)
    prefix, suffix, middle = part[1:hole], part[hole + 1 : end], part[end + 1 :]
    return "".join(map(BYTES.decode, (prefix, middle, suffix))), True


def test_documents_are_laid_end_to_end():
    packed = pack(DOCUMENTS, BYTES)
    assert packed.tokens.dtype == np.uint16
    assert [BYTES.decode(part) for part in _parts(packed.tokens)] == [d.text for d in DOCUMENTS]
    assert packed.text_bytes == sum(len(d.text.encode()) for d in DOCUMENTS)
    assert len(packed.tokens) == packed.text_bytes + len(DOCUMENTS)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_fim_rearranges_its_share_and_loses_nothing(rate):
    packed = pack(DOCUMENTS, BYTES, fim_rate=rate, seed=1)
    restored = [_restore(part) for part in _parts(packed.tokens)]
    assert [text for text, _ in restored] == [document.text for document in DOCUMENTS]
    changed = sum(fim for _, fim in restored)
    assert abs(changed / len(DOCUMENTS) - rate) < 0.1
    assert len(packed.tokens) == packed.text_bytes + len(DOCUMENTS) + 3 * changed


def test_fim_cuts_vary_and_may_leave_a_part_empty():
    documents = [Document(str(i), "abc") for i in range(300)]
    parts = {tuple(part) for part in _parts(pack(documents, BYTES, fim_rate=1.0).tokens)}
    assert len(parts) == 10  # all pairs 0 <= first <= second <= 3


def test_fim_depends_on_the_seed_and_the_document_alone():
    first, again = (pack(DOCUMENTS, BYTES, fim_rate=0.5, seed=3).tokens for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, pack(DOCUMENTS, BYTES, fim_rate=0.5, seed=4).tokens)
    fewer = pack(DOCUMENTS[:50], BYTES, fim_rate=0.5, seed=3).tokens
    np.testing.assert_array_equal(fewer, first[: len(fewer)])


def test_large_vocabularies_take_wider_tokens():
    class Wide(ByteTokenizer):
        vocab_size = 2**16 + 1

    assert pack(DOCUMENTS, Wide()).tokens.dtype == np.uint32


def test_sequences_overlap_by_one_token_and_cover_the_array():
    tokens = np.arange(50, dtype=np.uint16)
    records = Sequences(Packed(tokens, 50), 8)
    assert len(records) == 6
    targets = np.concatenate([records[i][1:] for i in range(6)])
    np.testing.assert_array_equal(targets, np.arange(1, 49))
    np.testing.assert_array_equal(records[5], np.arange(40, 49))
    assert records[0].dtype == np.int32
    with pytest.raises(IndexError):
        records[6]


def test_a_sequence_may_take_the_whole_corpus_but_no_more():
    packed = Packed(np.arange(9, dtype=np.uint16), 9)
    assert len(Sequences(packed, 8)) == 1
    with pytest.raises(ValueError, match=r"seq_len=9 takes 10 tokens .* only 9"):
        Sequences(packed, 9)


def test_packing_checks_its_input():
    with pytest.raises(ValueError, match="0 documents"):
        pack([], BYTES)
    with pytest.raises(ValueError, match=r"fim_rate is 1\.5"):
        pack(DOCUMENTS, BYTES, fim_rate=1.5)
    with pytest.raises(ValueError, match="seed is -1"):
        pack(DOCUMENTS, BYTES, seed=-1)
    with pytest.raises(ValueError, match=r"float64\[2, 3\]"):
        Packed(np.zeros((2, 3)), 6)


def test_fim_without_its_tokens_is_refused():
    class NoFim(ByteTokenizer):
        fim_hole = None

    with pytest.raises(ValueError, match="set fim_rate to 0"):
        pack(DOCUMENTS, NoFim(), fim_rate=0.1)
    assert pack(DOCUMENTS, NoFim()).text_bytes > 0


def test_a_corpus_is_read_split_and_packed(tmp_path):
    for document in DOCUMENTS[:60]:
        (tmp_path / document.name).write_text(document.text)
    data = config.Data(paths=(str(tmp_path),), held_out=0.3, fim_rate=1.0)
    train, held_out, tokenizer = load_corpus_tokens(data, seed=0)
    assert tokenizer.vocab_size == 260
    texts = [_restore(part) for part in _parts(train.tokens)]
    assert all(fim for _, fim in texts)
    kept = [_restore(part) for part in _parts(held_out.tokens)]
    assert not any(fim for _, fim in kept)
    assert "".join(text for text, _ in kept).encode() == held_out_text(data)
    assert held_out.text_bytes == len(held_out_text(data))
    assert sorted(text for text, _ in texts + kept) == sorted(d.text for d in DOCUMENTS[:60])


def test_a_trained_tokenizer_packs_the_same_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = train_bpe(DOCUMENTS, 300, path)
    packed = pack(DOCUMENTS, tokenizer, fim_rate=0.5)
    assert len(packed.tokens) < packed.text_bytes / 2
    assert np.count_nonzero(packed.tokens == tokenizer.eod) == len(DOCUMENTS)
    assert len(tokenizer.decode(packed.tokens.tolist()).encode()) == packed.text_bytes
