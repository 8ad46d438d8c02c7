"""Whatever happens to a folder after its manifest was written is reported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dsjax.checkpoint.manifest import verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "deep" / "er" / "b.bin").write_bytes(b"second")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    return tmp_path


def _append_blank(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")


def _forge_digest_free(folder: Path) -> None:
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    document["files"]["a.bin"]["size"] += 1
    path.write_text(json.dumps(document))


def _link(folder: Path) -> None:
    target = folder.parent / f"{folder.name}.target"
    target.write_bytes(b"second")
    (folder / "deep/er/b.bin").unlink()
    (folder / "deep/er/b.bin").symlink_to(target)


def test_an_untouched_folder_has_no_problems(folder: Path) -> None:
    assert verify_manifest(folder) == []
    write_manifest(folder)
    assert verify_manifest(folder) == []


@pytest.mark.parametrize(
    ("harm", "report"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "a.bin").write_bytes(b"short"), "a.bin has 5 bytes, not 256"),
        (lambda f: (f / "a.bin").write_bytes(bytes(256)), "a.bin has changed"),
        (lambda f: (f / "deep/er/b.bin").write_bytes(b"secone"), "deep/er/b.bin has changed"),
        (lambda f: (f / "deep/new").touch(), "deep/new is extra"),
        (_link, "deep/er/b.bin is not a regular file"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_bytes(b""), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"[" * 9999), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff{}"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"files": {}}'), "manifest.json is damaged"),
        (_forge_digest_free, "manifest.json is damaged"),
        (_append_blank, "manifest.json is damaged"),
    ],
)
def test_every_harm_is_named(folder: Path, harm: Callable, report: str) -> None:
    harm(folder)
    problems = verify_manifest(folder)
    assert len(problems) == 1
    assert problems[0].startswith(report)


def test_several_harms_are_all_named(folder: Path) -> None:
    (folder / "a.bin").unlink()
    (folder / "empty").write_bytes(b"x")
    (folder / "more").touch()
    assert len(verify_manifest(folder)) == 3


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert verify_manifest(folder), f"byte {place}"
