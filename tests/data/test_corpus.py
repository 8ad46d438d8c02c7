import json

import pytest

from dsjax import config
from dsjax.data import corpus
from dsjax.data.corpus import Document, held_out_text, read_corpus, split_documents


def _documents(count):
    return [Document(f"{i}.txt", f"document {i}\n" * 5) for i in range(count)]


def _names(documents):
    return [document.name for document in documents]


def test_the_default_corpus_is_python_source_without_tests():
    documents = read_corpus().documents
    names = _names(documents)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    assert not any("test" in name.split("/") or "site-packages" in name for name in names)
    assert sum(len(document.text) for document in documents) > 4e6


def test_a_folder_gives_its_text_files_in_order_and_counts_the_rest(tmp_path):
    for name in ("b.txt", "a/c.md", ".hidden.txt", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "nul.bin").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_text("")
    read = read_corpus((str(tmp_path),))
    assert _names(read.documents) == ["a/c.md", "b.txt"]
    assert read.documents[0].text == "text of a/c.md"
    assert read.skipped == 2


def test_globs_are_recursive_and_a_file_counts_once(tmp_path):
    for name in ("x.py", "deep/er/y.py", "deep/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    read = read_corpus((str(tmp_path / "**/*.py"), str(tmp_path / "x.py")))
    assert sorted(document.text for document in read.documents) == ["deep/er/y.py", "x.py"]


def test_line_ends_are_kept(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r")
    assert read_corpus((str(tmp_path),)).documents[0].text == "a\r\nb\r"


def test_jsonl_gives_one_document_a_record(tmp_path):
    path = tmp_path / "data.jsonl"
    records = [{"body": "one\u2028line"}, {"body": ""}, {"body": "two"}]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n\n")
    read = read_corpus((str(path),), "body").documents
    assert read == (Document("data.jsonl:1", "one\u2028line"), Document("data.jsonl:3", "two"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ('{"other": "x"}', "'text'"),
        ('{"text": 3}', "'text'"),
        ("[1]", "'text'"),
        ('{"text": "\\ud800"}', "Unicode"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2.*{reason}"):
        read_corpus((str(path),))


def test_missing_paths_and_text_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*matches nothing"):
        read_corpus((str(tmp_path / "nowhere"),))
    (tmp_path / "a.bin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"no text in .*1 files are not"):
        read_corpus((str(tmp_path),))
    with pytest.raises(ValueError, match="give a tuple"):
        read_corpus("corpus.txt")


def test_the_split_ignores_names_order_and_company():
    documents = _documents(200)
    _, held_out = split_documents(documents, 0.2)
    assert 20 < len(held_out) < 60
    assert set(split_documents(documents[::-1], 0.2)[1]) == set(held_out)
    renamed = [Document(f"new/{d.name}", d.text) for d in documents]
    assert [d.text for d in split_documents(renamed, 0.2)[1]] == [d.text for d in held_out]
    half = set(split_documents(documents[:100], 0.2)[1])
    assert half == set(held_out) & set(documents[:100])


def test_the_split_parts_all_documents_in_order():
    documents = _documents(50)
    train, held_out = split_documents(documents, 0.3)
    assert sorted(train + held_out, key=documents.index) == documents
    assert list(train) == sorted(train, key=documents.index)


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_a_small_corpus_has_both_sides(held_out):
    documents = _documents(3)
    train, held = split_documents(documents, held_out)
    assert (len(train), len(held)) == ((2, 1) if held_out < 0.5 else (1, 2))
    moved = held[0] if held_out < 0.5 else train[0]
    order = sorted(documents, key=lambda document: corpus._content_share(document.text))
    assert moved == order[0 if held_out < 0.5 else -1]


def test_copies_of_a_document_stay_on_one_side():
    documents = [Document(str(i), f"text {i % 10}") for i in range(40)]
    train, held_out = split_documents(documents, 0.4)
    assert not {d.text for d in train} & {d.text for d in held_out}


def test_a_single_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    (train,), (held_out,) = split_documents([Document("one", text)], 0.1)
    assert train.text + held_out.text == text
    assert train.text.endswith("\n")
    assert abs(len(held_out.text) / len(text) - 0.1) < 0.02
    (train,), (held_out,) = split_documents([Document("one", "no line end")], 0.1)
    assert (train.text, held_out.text) == ("no line en", "d")


def test_too_little_to_split_is_refused():
    with pytest.raises(ValueError, match="one character"):
        split_documents([Document("dot", ".")], 0.1)
    with pytest.raises(ValueError, match="0 documents"):
        split_documents([], 0.1)
    with pytest.raises(ValueError, match="held_out is 1"):
        split_documents(_documents(3), 1)


def test_held_out_text_is_the_text_of_that_side(tmp_path):
    for document in _documents(20):
        (tmp_path / document.name).write_text(document.text + "é")
    data = config.Data(paths=(str(tmp_path),), held_out=0.3)
    _, held_out = split_documents(read_corpus(data.paths).documents, 0.3)
    assert held_out_text(data).decode() == "".join(document.text for document in held_out)
