"""Documents from files, folders, globs and JSONL, and their split by content.

With no path at all the corpus is the source of Python's own standard library: about ten megabytes
of code that every machine which runs this program already has. The split hashes content, not
names or positions, so a document stays on its side when others come, go or move. A corpus is
held in memory.
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsjax import config

# Left out of the standard library: tests, bundled applications, installed packages, and what is
# generated for one build of Python.
_STDLIB_SKIP = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"),
    *("turtledemo", "ensurepip", "lib-dynload", "__pycache__"),
}
_STDLIB_SKIP_PREFIX = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One text and the name it came under."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and how many files were not UTF-8 text."""

    documents: tuple[Document, ...]
    skipped: int = 0


def read_corpus(paths: Sequence[str] = (), text_field: str = "text") -> Corpus:
    """Read every text under `paths`; ValueError if a path is missing or there is no text."""
    if isinstance(paths, str):
        raise ValueError(f"paths is the string {paths!r}: give a tuple of paths")
    files = _unique(_path_files(paths)) if paths else _stdlib_files()
    documents: list[Document] = []
    skipped = 0
    for name, path in files:
        text = _read_text(path)
        if text is None:
            skipped += 1
        else:
            documents += _documents(name, path, text, text_field)
    if not documents:
        raise ValueError(
            f"no text in {list(paths) or sysconfig.get_path('stdlib')} ({skipped} files are not "
            "UTF-8): give files, folders or globs that hold UTF-8 text, or JSONL"
        )
    return Corpus(tuple(documents), skipped)


def split_documents(
    documents: Sequence[Document], held_out: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Train and held-out documents; ValueError if there is too little text for two sides."""
    if not documents:
        raise ValueError("there are 0 documents: at least one is needed to split")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}: it must lie between 0 and 1, both excluded")
    shares = [_content_share(document.text) for document in documents]
    distinct = sorted(set(shares))
    if len(distinct) == 1:
        return _cut(documents[0], held_out)
    held = {share for share in distinct if share < held_out} or {distinct[0]}
    held -= {distinct[-1]}
    pairs = tuple(zip(documents, shares, strict=True))
    train = tuple(document for document, share in pairs if share not in held)
    return train, tuple(document for document, share in pairs if share in held)


def held_out_text(data: config.Data) -> bytes:
    """The held-out side as plain UTF-8, for a compressor to compare with; reads the corpus."""
    documents = read_corpus(data.paths, data.text_field).documents
    _, held_out = split_documents(documents, data.held_out)
    return b"".join(document.text.encode() for document in held_out)


def _content_share(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _cut(document: Document, held_out: float) -> tuple[tuple[Document], tuple[Document]]:
    """Cut the only document at the line boundary nearest to its share, or inside its one line."""
    text, name = document.text, document.name
    if len(text) < 2:
        raise ValueError(f"{name} is all there is and holds one character: give more text")
    target = round(len(text) * (1 - held_out))
    lines = (text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1)
    near = [at for at in lines if 0 < at < len(text)] or [min(max(target, 1), len(text) - 1)]
    at = min(near, key=lambda position: abs(position - target))
    return (Document(f"{name}:head", text[:at]),), (Document(f"{name}:tail", text[at:]),)


def _documents(name: str, path: Path, text: str, text_field: str) -> list[Document]:
    if path.suffix == ".jsonl":
        return list(_jsonl(name, path, text, text_field))
    return [Document(name, text)] if text else []


def _jsonl(name: str, path: Path, text: str, text_field: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            value = _json_text(line, text_field, f"{path}, line {number}")
            if value:
                yield Document(f"{name}:{number}", value)


def _json_text(line: str, text_field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); JSONL holds one object a line") from None
    value = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: no string in field {text_field!r}; set text_field to the text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text_field!r} is not valid Unicode ({error})") from None
    return value


def _read_text(path: Path) -> str | None:
    """The text of a file, or None for one that is not UTF-8 or holds a NUL."""
    raw = path.read_bytes()
    if b"\0" in raw:
        return None
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _path_files(paths: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for pattern in paths:
        path = Path(pattern).expanduser()
        matches = (
            [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        )
        if not matches:
            raise ValueError(f"{pattern!r} matches nothing: give a file, a folder or a glob")
        for match in matches:
            yield from [(match.name, match)] if match.is_file() else _folder_files(match)


def _folder_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Regular files below a folder, sorted by relative name; hidden ones are left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in found if path.is_file())


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    for name, path in _folder_files(Path(sysconfig.get_path("stdlib"))):
        parts = name.split("/")
        left_out = any(p in _STDLIB_SKIP or p.startswith(_STDLIB_SKIP_PREFIX) for p in parts)
        if name.endswith(".py") and not left_out:
            yield name, path


def _unique(files: Iterator[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """Each file once, under its first name, however many paths reach it."""
    seen: set[Path] = set()
    for name, path in files:
        real = path.resolve()
        if real not in seen:
            seen.add(real)
            yield name, path
