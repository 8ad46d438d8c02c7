"""Files in the safetensors format: every dtype both ways, and every kind of damage refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsjax.hf.folder import Folder
from dsjax.hf.safetensors import DTYPES, File, Spec, write


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    write(path, [Spec(n, a.dtype, a.shape) for n, a in tensors.items()], tensors.__getitem__)


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: str = "U8") -> dict:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_dtype_round_trips(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {}
    for code, dtype in DTYPES.items():
        raw = generator.integers(0, 2, (3, 5, dtype.itemsize), dtype=np.uint8)
        tensors[code] = raw.view(dtype)[..., 0]
    tensors |= {"scalar": np.float32(3).reshape(()), "empty": np.empty((0, 4), np.float32)}
    tensors["transposed"] = np.arange(6, dtype=np.int64).reshape(2, 3).T
    save(tmp_path / "a.safetensors", tensors)
    file = File(tmp_path / "a.safetensors")
    assert set(file) == set(tensors)
    for name, array in tensors.items():
        assert file[name].dtype == array.dtype
        assert file[name].shape == array.shape
        assert file[name].tobytes() == array.tobytes()
        assert file[name].flags.aligned


def test_unaligned_tensor_is_read(tmp_path):
    header = {"a": entry(0, 1), "b": entry(1, 9, [2], "F32")}
    path = with_header(tmp_path / "f", header, b"x" + np.float32([1, 2]).tobytes())
    np.testing.assert_array_equal(File(path)["b"], [1, 2])


def test_any_truncation_is_refused(tmp_path):
    save(tmp_path / "whole", {"a": np.arange(4, dtype=np.float32), "b": np.ones(3, np.uint8)})
    whole = (tmp_path / "whole").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut: not a complete safetensors file"):
            File(tmp_path / "cut")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (b"[]", b"", "not a JSON object"),
        (b" {}", b"", "not a JSON object"),
        (b"{nonsense", b"", "not JSON"),
        (b"\xff{}", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a":{"dtype":"U8"},"a":{"dtype":"U8"}}', b"", "'a' appears twice"),
        ({"__metadata__": {"format": 1}}, b"", "table of strings"),
        ({"a": 3}, b"", "needs exactly"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"x", "needs exactly"),
        ({"a": entry(0, 1, dtype="F3")}, b"x", "dtype 'F3'"),
        ({"a": entry(0, 1, [-1])}, b"x", r"shape \[-1\]"),
        ({"a": entry(0, 1, [True])}, b"x", r"shape \[True\]"),
        ({"a": entry(0, 1, 1)}, b"x", "shape 1"),
        ({"a": entry(0, 4, [2], "F32")}, b"xxxx", "needs 8"),
        ({"a": {**entry(0, 1), "data_offsets": [0]}}, b"x", "data_offsets"),
        ({"a": {**entry(0, 1), "data_offsets": [1, 0]}}, b"x", "hold -1 bytes"),
        ({"a": entry(1, 2)}, b"xx", "leaves a hole"),
        ({"a": entry(0, 2), "b": entry(1, 3)}, b"xxx", "overlaps"),
        ({"a": entry(0, 2)}, b"xxx", "3 bytes of tensors where the header promises 2"),
        ({"a": entry(0, 2)}, b"x", "1 bytes of tensors where the header promises 2"),
    ],
)
def test_damaged_header_is_refused(tmp_path, header, data, reason):
    with pytest.raises(ValueError, match=reason):
        File(with_header(tmp_path / "f", header, data))


def test_huge_header_length_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(ValueError, match="header of 18446744073709551615 bytes"):
        File(tmp_path / "f")


def test_failed_write_leaves_nothing(tmp_path):
    specs = [Spec("a", np.dtype(np.float32), (2,))]
    with pytest.raises(ValueError, match="delivered as float64"):
        write(tmp_path / "f", specs, lambda _: np.ones(2))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must be unique"):
        write(tmp_path / "f", specs * 2, lambda _: np.ones(2, np.float32))


def test_folder_checks_its_index(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        Folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        Folder(tmp_path)
    save(tmp_path / "s1", {"a": np.ones(1, np.uint8)})
    for weight_map, reason in (
        ({"a": "s1", "b": "s1"}, "promises b"),
        ({"a": "s1", "b": "s2"}, "names this shard, it is missing"),
        ({"a": "../s1"}, "plain file name"),
        ([], "weight_map is"),
    ):
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=reason):
            Folder(tmp_path)
    save(tmp_path / "s1", {"a": np.ones(1, np.uint8), "c": np.ones(1, np.uint8)})
    index.write_text(json.dumps({"weight_map": {"a": "s1"}}))
    with pytest.raises(ValueError, match="holds c, which the index does not name"):
        Folder(tmp_path)
