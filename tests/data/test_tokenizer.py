import json

import numpy as np
import pytest
import tokenizers

from dsjax.data import tokenizer as module
from dsjax.data.corpus import Document
from dsjax.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    StreamDecoder,
    load_tokenizer,
    train_bpe,
)

TEXT = "naïve café 12345\r\n\tдом 深度求索 🐋👩‍👩‍👧 \ufffd\x00 end  \n"
CODE = [Document(str(i), f"def f{i}(x):\n    return x + {i * 7919}\n") for i in range(50)]


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "made/tokenizer.json"
    train_bpe(CODE, 320, path)
    return path


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe_path):
    return ByteTokenizer() if request.param == "bytes" else JsonTokenizer(bpe_path)


def test_any_text_survives_the_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode(TEXT))


def test_batches_encode_as_single_texts_do(tokenizer):
    texts = ["", TEXT, "x", *(document.text for document in CODE)] * 6
    arrays = tokenizer.encode_batch(texts)
    assert [array.tolist() for array in arrays] == [tokenizer.encode(text) for text in texts]


def test_a_stream_shows_whole_characters_and_loses_none(tokenizer):
    decoder = StreamDecoder(tokenizer)
    shown = [decoder.push(token) for token in tokenizer.encode("a🐋é")]
    assert [text for text in shown if text] == ["a", "🐋", "é"]
    assert decoder.finish() == ""
    assert "".join(map(decoder.push, tokenizer.encode(TEXT))) == TEXT


def test_a_stream_that_breaks_off_inside_a_character_says_so():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(token) for token in "🐋".encode()[:3]] == ["", "", ""]
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


def test_special_tokens_and_padding_ids_have_no_text(tokenizer):
    special = [tokenizer.eod, *tokenizer.fim_tokens()]
    assert len(set(special)) == 4
    assert tokenizer.decode([*special, tokenizer.vocab_size, *tokenizer.encode("x")]) == "x"
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode([-1])


def test_the_byte_tokenizer_is_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eod) == (260, 256)
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.encode_batch(["é"])[0].dtype == np.uint8


def test_bpe_learns_shorter_codes_and_decodes_as_the_library(bpe_path):
    tokenizer = JsonTokenizer(bpe_path)
    tokens = tokenizer.encode(CODE[3].text)
    assert tokenizer.vocab_size == 320
    assert len(tokens) < len(CODE[3].text) / 2
    library = tokenizers.Tokenizer.from_file(str(bpe_path))
    assert library.decode(tokenizer.encode(TEXT)) == TEXT
    spelt = {library.id_to_token(token) for token in range(320)}
    assert not any(sum(c.isdigit() for c in token) > 3 for token in spelt)


def test_the_byte_alphabet_is_that_of_the_library():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(module._byte_alphabet()) == sorted(alphabet)
    assert len(set(module._byte_alphabet().values())) == 256


def _respell(source, target, change):
    spec = json.loads(source.read_text())
    change(spec)
    target.write_text(json.dumps(spec))
    return target


def _deepseek_names(spec):
    for names in module._NAMES.values():
        for added in spec["added_tokens"]:
            if added["content"] == names[1]:
                spec["model"]["vocab"][names[0]] = spec["model"]["vocab"].pop(names[1])
                added.update(content=names[0], special="fim" not in names[0])


def test_special_tokens_in_a_text_are_text_unless_asked_for(bpe_path, tmp_path):
    path = _respell(bpe_path, tmp_path / "tokenizer.json", _deepseek_names)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.eod, *tokenizer.fim_tokens()) == (0, 1, 2, 3)
    for token, names in enumerate(module._NAMES.values()):
        spelt = f"a{names[0]}"
        assert token not in tokenizer.encode(spelt)
        assert token not in tokenizer.encode_batch([spelt])[0]
        assert tokenizer.decode(tokenizer.encode(spelt)) == spelt
        assert tokenizer.encode(spelt, parse_special=True) == [*tokenizer.encode("a"), token]
    assert tokenizer.encode(TEXT) == load_tokenizer(str(path)).encode(TEXT)


def _drop(word):
    def change(spec):
        kept = [added for added in spec["added_tokens"] if word not in added["content"]]
        vocab = spec["model"]["vocab"]
        spec["added_tokens"] = kept
        spec["model"]["vocab"] = {k: v for k, v in vocab.items() if f"<|{word}" not in k}

    return change


def test_missing_special_tokens_are_named(bpe_path, tmp_path):
    no_fim = JsonTokenizer(_respell(bpe_path, tmp_path / "no_fim.json", _drop("fim_hole")))
    with pytest.raises(ValueError, match=r"fim_hole.*set fim_rate to 0"):
        no_fim.fim_tokens()
    path = _respell(bpe_path, tmp_path / "no_eod.json", _drop("end_of_document"))
    with pytest.raises(ValueError, match="no end-of-document token"):
        JsonTokenizer(path)


def test_unusable_tokenizers_are_refused(bpe_path, tmp_path):
    with pytest.raises(ValueError, match=r"'words'.*give `bytes`"):
        load_tokenizer("words")
    with pytest.raises(ValueError, match="no file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: not a tokenizer"):
        load_tokenizer(str(tmp_path / "x.json"))
    path = _respell(bpe_path, tmp_path / "y.json", lambda spec: spec.update(decoder=None))
    with pytest.raises(ValueError, match="not ByteLevel"):
        JsonTokenizer(path)


def test_training_checks_its_settings(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size is 259.* 260"):
        train_bpe(CODE, 259, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"\.json file"):
        train_bpe(CODE, 300, tmp_path)


def test_training_twice_gives_the_same_file(bpe_path, tmp_path):
    train_bpe(iter(CODE), 320, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == bpe_path.read_bytes()
