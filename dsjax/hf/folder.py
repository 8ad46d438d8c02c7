"""A checkpoint's folder: one `model.safetensors`, or shards named by an index.

A folder is written beside its final place and moved in at the end, `config.json` last: a folder
without it is a save that did not finish.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dsjax.hf import safetensors
from dsjax.hf.safetensors import Spec

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def read_json(path: Path) -> dict:
    """A JSON object; ValueError names the file if it is missing, damaged or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    return found


class Folder(Mapping[str, np.ndarray]):
    """All tensors of a checkpoint, whichever file they lie in; reads one when it is asked for."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path}: no such folder")
        if (self.path / SINGLE).exists() or not (self.path / INDEX).exists():
            file = safetensors.File(self.path / SINGLE)
            self._files = dict.fromkeys(file, file)
        else:
            self._files = _open_shards(self.path)

    def spec(self, name: str) -> Spec:
        return self._files[name].specs[name]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _open_shards(path: Path) -> dict[str, safetensors.File]:
    """Which file holds each tensor, checked both ways against the index."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path / INDEX}: weight_map is {weight_map!r}, expected a table of names")
    shards = {name: _open_shard(path, name) for name in sorted(set(map(str, weight_map.values())))}
    for name, shard in weight_map.items():
        if name not in shards[str(shard)]:
            raise ValueError(f"{path / str(shard)}: the index promises {name}, it is not there")
    for shard, file in shards.items():
        for name in file:
            if weight_map.get(name) != shard:
                raise ValueError(f"{path / shard}: holds {name}, which the index does not name")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _open_shard(path: Path, name: str) -> safetensors.File:
    if Path(name).name != name:
        raise ValueError(f"{path / INDEX}: shard {name!r}: expected a plain file name")
    if not (path / name).is_file():
        raise ValueError(f"{path / name}: the index names this shard, it is missing")
    return safetensors.File(path / name)


def write_folder(
    path: Path,
    specs: Sequence[Spec],
    read: Callable[[str], np.ndarray],
    finish: Callable[[], dict],
    *,
    shard_bytes: int,
    tokenizer_from: Path | None = None,
) -> None:
    """Write tensors one at a time, then the config that `finish()` returns once all are written.

    What `path` held of an older checkpoint is replaced at the end; other files stay.
    """
    staging = _staging(path)
    try:
        files = _write_shards(staging, specs, read, shard_bytes)
        files += _copy_tokenizer(tokenizer_from, staging) if tokenizer_from else []
        _write_json(staging / CONFIG, finish())
        _move_in(staging, path, [*files, CONFIG])
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging(path: Path) -> Path:
    """A fresh folder inside `path`, so that moving out of it is a rename."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file, give a folder to save into")
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".saving-", dir=path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error


def _write_shards(
    staging: Path, specs: Sequence[Spec], read: Callable[[str], np.ndarray], shard_bytes: int
) -> list[str]:
    shards = plan_shards(specs, shard_bytes)
    if len(shards) == 1:
        safetensors.write(staging / SINGLE, specs, read)
        return [SINGLE]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        safetensors.write(staging / name, shard, read)
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
        "weight_map": {
            spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard
        },
    }
    _write_json(staging / INDEX, index)
    return [*names, INDEX]


def plan_shards(specs: Sequence[Spec], shard_bytes: int) -> list[list[Spec]]:
    """Split in order so that no shard exceeds `shard_bytes`, unless a single tensor does."""
    shards, size = [[]], 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _copy_tokenizer(source: Path, target: Path) -> list[str]:
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found and not (source / CONFIG).is_file():
        raise ValueError(f"{source}: no tokenizer here, expected one of {TOKENIZER_FILES}")
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def _write_json(path: Path, content: dict) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _move_in(staging: Path, path: Path, files: list[str]) -> None:
    """Rename into place, the last file last; weights of an older checkpoint are removed."""
    (path / CONFIG).unlink(missing_ok=True)
    for old in (*path.glob("model*.safetensors"), path / INDEX):
        if old.name not in files:
            old.unlink(missing_ok=True)
    for name in files:
        (staging / name).replace(path / name)
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
