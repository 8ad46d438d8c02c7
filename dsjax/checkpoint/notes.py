"""`meta.json`: the caller's notes and the table of leaves of one step."""

import json
from pathlib import Path
from typing import Any

from dsjax.checkpoint.leaves import Table

NAME = "meta.json"


def encode(meta: dict, leaves: Table) -> bytes:
    """The file's content; raises ValueError naming the first key that JSON cannot hold."""
    try:
        _check(meta, "meta")
    except RecursionError:
        raise ValueError("meta contains itself, or is nested too deeply for JSON") from None
    return json.dumps({"meta": meta, "leaves": leaves}).encode()


def read(folder: Path) -> tuple[dict, Table]:
    """The notes and the leaves of a verified step folder; may raise OSError or ValueError."""
    document = json.loads((folder / NAME).read_bytes())
    return document["meta"], document["leaves"]


def _check(value: Any, path: str) -> None:
    match value:
        case None | bool() | int() | float() | str():
            return
        case dict():
            for key, child in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{path} has the key {key!r}: JSON allows only text")
                _check(child, f"{path}.{key}")
        case list() | tuple():
            for index, child in enumerate(value):
                _check(child, f"{path}[{index}]")
        case _:
            raise ValueError(f"{path} is a {type(value).__name__}, which JSON cannot hold")
