"""The safetensors format, read lazily and written as a stream.

The library's numpy reader does not know FP8 and its writer wants every tensor at once, so both are
done here. A file is 8 bytes of header length, a JSON header and the tensors without any gap; the
header is checked in full before the first tensor is read, so damage is found when a file is opened.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Spec:
    """Name, type and shape of one stored tensor."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class File(Mapping[str, np.ndarray]):
    """One file: `file[name]` maps that tensor read-only; a damaged file raises ValueError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header, self._start = _read_header(self.path)
        self.metadata = _metadata(self.path, header)
        tensors = {name: _tensor(self.path, name, entry) for name, entry in header.items()}
        self._begin = {name: begin for name, (_, begin) in tensors.items()}
        self.specs = {name: spec for name, (spec, _) in tensors.items()}
        _check_layout(self.path, tensors.values(), self.path.stat().st_size - self._start)

    def __getitem__(self, name: str) -> np.ndarray:
        spec = self.specs[name]
        if not spec.nbytes:
            return np.empty(spec.shape, spec.dtype)
        offset = self._start + self._begin[name]
        # A mapping for each tensor: its pages leave memory together with the array.
        raw = np.memmap(self.path, np.uint8, "r", offset, (spec.nbytes,)).view(np.ndarray)
        if offset % spec.dtype.itemsize:
            raw = raw.copy()
        return raw.view(spec.dtype).reshape(spec.shape)

    def __iter__(self):
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def _read_header(path: Path) -> tuple[dict, int]:
    """The JSON header and the offset of the first tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
                raise _damaged(path, f"header of {length} bytes in a file of {size} bytes")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, f"the header is not JSON: {error}") from error
    if not text.startswith(b"{") or not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    return header, 8 + length


def _unique(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _damaged(path, f"{twice!r} appears twice in the header")
    return found


def _metadata(path: Path, header: dict) -> dict[str, str]:
    """Takes `__metadata__` out of the header."""
    found = header.pop("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise _damaged(path, "__metadata__ is not a table of strings")
    return found


def _tensor(path: Path, name: str, entry: object) -> tuple[Spec, int]:
    """One header entry as its spec and where it begins."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name}: needs exactly dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise _damaged(path, f"{name}: dtype {entry['dtype']!r}, known are {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise _damaged(path, f"{name}: shape {shape!r}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"{name}: data_offsets {offsets!r}")
    spec = Spec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _damaged(
            path,
            f"{name}: data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, "
            f"{entry['dtype']} of shape {shape} needs {spec.nbytes}",
        )
    return spec, offsets[0]


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_layout(path: Path, tensors: Iterable[tuple[Spec, int]], size: int) -> None:
    """The tensors fill the file exactly: no hole, no overlap, nothing behind the end."""
    end = 0
    for spec, begin in sorted(tensors, key=lambda tensor: (tensor[1], tensor[0].nbytes)):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise _damaged(path, f"{spec.name}: begins at {begin} and {what}, which ends at {end}")
        end += spec.nbytes
    if end != size:
        raise _damaged(path, f"{size} bytes of tensors where the header promises {end}")


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path}: not a complete safetensors file: {reason}")


def write(
    path: str | os.PathLike[str], specs: Iterable[Spec], read: Callable[[str], np.ndarray]
) -> None:
    """Write one file, calling `read(name)` for a tensor at a time in the order of `specs`.

    The file appears under its name only when it is complete and on disk. On disk wider types come
    first, so that every tensor is aligned.
    """
    path, specs = Path(path), list(specs)
    part = path.with_name(path.name + ".part")
    header, begin = _layout(specs)
    try:
        with part.open("wb") as file:
            file.write(header)
            for spec in specs:
                file.seek(len(header) + begin[spec.name])
                array = np.ascontiguousarray(_checked(spec, read(spec.name)))
                file.write(array.view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _layout(specs: list[Spec]) -> tuple[bytes, dict[str, int]]:
    """The header, padded to 8 bytes, and where each tensor begins behind it."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin, end = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        if spec.dtype not in _CODES:
            raise ValueError(f"{spec.name}: safetensors has no dtype for {spec.dtype}")
        if spec.name in begin or spec.name == "__metadata__":
            raise ValueError(f"{spec.name}: this name is taken, tensor names must be unique")
        begin[spec.name], end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begin


def _checked(spec: Spec, array: np.ndarray) -> np.ndarray:
    if array.dtype != spec.dtype or array.shape != spec.shape:
        raise ValueError(
            f"{spec.name}: announced as {spec.dtype} {spec.shape}, "
            f"delivered as {array.dtype} {array.shape}"
        )
    return array.reshape(-1)
