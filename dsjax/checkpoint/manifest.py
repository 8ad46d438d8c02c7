"""Checksums of a folder, kept in the folder.

Orbax restores a flipped byte silently, so every file of a step is listed with its size and
SHA-256. The list guards itself too: `manifest.json` must equal, byte for byte, what would be
written for the table it holds, digest included.
"""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

NAME = "manifest.json"
THREADS = 8


class Entry(TypedDict):
    size: int
    sha256: str


type Table = dict[str, Entry]


def write_manifest(folder: Path) -> None:
    """Flush every file under `folder` to disk and list it in the manifest; may raise OSError."""
    names = sorted(_names(folder))
    with ThreadPoolExecutor(THREADS) as pool:
        table = dict(zip(names, pool.map(lambda name: _flush(folder / name), names), strict=True))
    write_durably(folder / NAME, _encode(table))
    for parent, _, _ in os.walk(folder, topdown=False):
        sync(Path(parent))


def verify_manifest(folder: Path) -> list[str]:
    """Name every file that is missing, truncated, changed, extra or unreadable; [] if all is well.

    Raises nothing: what cannot be read is reported.
    """
    try:
        table = _decode((folder / NAME).read_bytes())
        names = _names(folder)
    except FileNotFoundError:
        return [f"{NAME} is missing"]
    except OSError as error:
        return [f"{NAME} or a folder is unreadable ({error})"]
    except (ValueError, RecursionError) as error:
        return [f"{NAME} is damaged ({error})"]
    missing = [f"{name} is missing" for name in sorted(table.keys() - names)]
    extra = [f"{name} is extra" for name in sorted(names - table.keys())]
    shared = sorted(names & table.keys())
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _problem(folder, name, table[name]), shared)
        return missing + extra + [problem for problem in found if problem]


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk; may raise OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder to disk; may raise OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(folder: Path) -> set[str]:
    names = set()
    for parent, _, files in os.walk(folder, onerror=_raise):
        names |= {(Path(parent) / file).relative_to(folder).as_posix() for file in files}
    return names - {NAME}


def _raise(error: OSError) -> None:
    raise error


def _flush(path: Path) -> Entry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _problem(folder: Path, name: str, entry: Entry) -> str | None:
    path = folder / name
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not a regular file"
        if found.st_size != entry["size"]:
            return f"{name} has {found.st_size} bytes, not {entry['size']}"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except OSError as error:
        return f"{name} is unreadable ({error})"
    return None if same else f"{name} has changed"


def _encode(table: Table) -> bytes:
    canonical = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    document = {"digest": hashlib.sha256(canonical).hexdigest(), "files": table}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def _decode(content: bytes) -> Table:
    document = json.loads(content)
    table = document.get("files") if isinstance(document, dict) else None
    if not isinstance(table, dict) or _encode(table) != content:
        raise ValueError("it does not match its own digest")
    return table
