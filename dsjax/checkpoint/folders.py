"""The folders of a store: `00000120` is committed, all other names are not.

A step is written under a `.partial-` name and renamed when it is whole; it is removed by
renaming it to a `.trash-` name first. So a kill at any moment leaves no half-written and no
half-deleted step under a committed name.
"""

import fcntl
import os
import re
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from dsjax.checkpoint.manifest import sync

_COMMITTED = re.compile(r"[0-9]{8}|[1-9][0-9]{8,}")
_PARTIAL = re.compile(r"[0-9]{8,}\.partial-\w+")
_TRASH = re.compile(r"[0-9]{8,}\.trash-\w+")


def create(folder: Path) -> None:
    """Make the folder; raises ValueError with the reason if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"cannot write checkpoints to {folder}: {error.strerror}") from error


def committed(folder: Path, step: int) -> Path:
    """Where a step lies once it is whole."""
    return folder / f"{step:08d}"


def partial(folder: Path, step: int, token: int) -> Path:
    """Where a step is put together."""
    return folder / f"{step:08d}.partial-{token:08x}"


def steps(folder: Path) -> list[int]:
    """The committed steps, ascending; may raise OSError."""
    return sorted(int(path.name) for path in folder.iterdir() if _COMMITTED.fullmatch(path.name))


def make_locked(path: Path) -> int:
    """Make a partial folder and hold its lock, which the kernel drops when this process dies.

    Returns the descriptor to close; may raise OSError.
    """
    path.mkdir()
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def publish(path: Path, final: Path) -> None:
    """Give a whole step its committed name, replacing a damaged one; may raise OSError."""
    if final.exists():
        remove(final)
    path.rename(final)
    sync(final.parent)


def remove(final: Path) -> None:
    """Take back the committed name, then delete; may raise OSError before anything is deleted."""
    trash = final.with_name(f"{final.name}.trash-{uuid.uuid4().hex[:8]}")
    final.rename(trash)
    sync(final.parent)
    shutil.rmtree(trash, ignore_errors=True)


def prune(folder: Path, keep: int, spare: int) -> None:
    """Remove all but the newest `keep` steps, and never `spare`; may raise OSError."""
    for step in steps(folder)[:-keep]:
        if step != spare:
            remove(committed(folder, step))


def discard(path: Path) -> None:
    """Delete a folder without a committed name as far as that is possible."""
    shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete trash and the partial folders of dead runs; may raise OSError."""
    for path in folder.iterdir():
        if _TRASH.fullmatch(path.name):
            discard(path)
        elif _PARTIAL.fullmatch(path.name):
            _discard_if_dead(path)


def _discard_if_dead(path: Path) -> None:
    """Delete a partial folder whose lock is free: another program may read beside a live run."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            discard(path)
        finally:
            os.close(handle)
