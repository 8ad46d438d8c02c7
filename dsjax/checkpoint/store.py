"""Steps of a run on disk: saved in the background, verified when read.

    <folder>/00000120/state/         the arrays (Orbax)
                      meta.json      the caller's notes and the table of leaves
                      manifest.json  size and SHA-256 of every file

A step appears under its name only when it is whole and flushed to disk. Where the devices have
room for a copy of the state, a save takes no longer than that copy; else it takes as long as the
copy to the host.
"""

import logging
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import jax

from dsjax.checkpoint import folders, hosts, leaves, notes
from dsjax.checkpoint.arrays import ArrayWriter, read_arrays
from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.leaves import PyTree
from dsjax.checkpoint.manifest import verify_manifest
from dsjax.checkpoint.saving import Save
from dsjax.checkpoint.snapshot import has_room

log = logging.getLogger("dsjax.checkpoint")


@dataclass(frozen=True)
class Restored:
    """A state read back, and the newer steps passed over because they are damaged."""

    step: int
    state: PyTree
    meta: dict
    skipped: dict[int, list[str]]
    """Damaged step to what is wrong with it, one line a file."""


class CheckpointStore:
    """The checkpoints of one run; one program writes, others may read beside it.

    Use it in a `with` block or close it: Python lets no write finish after its main thread has
    ended, so a save still in flight then is given up (and its leftovers removed).
    """

    def __init__(self, folder: Path, *, keep: int = 3) -> None:
        """Open or create a store; raises ValueError if the folder cannot be written."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: it must be at least 1")
        self.folder = Path(folder).absolute()
        self.keep = keep
        folders.create(self.folder)
        if hosts.is_first():
            folders.remove_leftovers(self.folder)
        self._writer: ArrayWriter | None = ArrayWriter()
        self._saving: Save | None = None
        self._on_devices: bool | None = None

    def save(self, step: int, state: PyTree, meta: dict) -> None:
        """Copy the state, then write it in the background; an equal, good step is kept.

        The arrays may be given up (donated) as soon as this returns. It waits for the save
        before.

        Raises ValueError for what cannot be stored, and CheckpointError if this save cannot
        start or the one before it failed.
        """
        step = _checked(step)
        arrays = leaves.flatten(state)
        leaves.check_storable(arrays)
        content = notes.encode(meta, leaves.describe(arrays))
        if self._writer is None:
            raise ValueError(f"the store in {self.folder} is closed")
        self.wait()
        if step in self.steps() and not self._problems(step):
            log.info("step %d is saved already", step)
            return
        saving = Save(self._writer, self.folder, step, content, self.keep)
        try:
            saving.start(arrays, on_devices=self._have_room(arrays))
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = saving

    def wait(self) -> None:
        """Return once the save in flight is committed; raises CheckpointError if it failed."""
        saving = self._saving
        error = saving.join() if saving else None
        self._saving = None
        if saving and hosts.any_true(error is not None):
            raise self._failed(saving.step, error) from error

    def steps(self) -> list[int]:
        """The committed steps, ascending, damaged ones included."""
        return folders.steps(self.folder)

    def read_meta(self, step: int | None = None) -> tuple[int, dict]:
        """A verified step, the newest good one by default, and its notes.

        Raises CheckpointError if the step, or every step, is missing or damaged.
        """
        found, _ = self._find(step)
        return found, notes.read(folders.committed(self.folder, found))[0]

    def restore(self, like: PyTree, step: int | None = None) -> Restored:
        """Read a verified step, the newest good one by default, into the shardings of `like`.

        Raises CheckpointError if the step, or every step, is missing or damaged, and if `like`
        differs from what is stored in structure, shape or dtype; ValueError if `like` comes from
        eval_shape on a mesh and no mesh is set.
        """
        found, skipped = self._find(step)
        meta, stored = notes.read(folders.committed(self.folder, found))
        wanted = leaves.flatten(like)
        leaves.check_same(found, leaves.describe(wanted), stored)
        arrays = self._read(found, wanted)
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
        return Restored(found, state, meta, skipped)

    def close(self) -> None:
        """Wait for the save in flight and stop; raises CheckpointError if it failed."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            self.wait()
        finally:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError:
            # An error on its way out matters more; this one has been logged.
            if kind is None:
                raise

    def _have_room(self, arrays: dict[str, jax.Array]) -> bool:
        """Whether to copy on the devices: decided once, as then their peak includes the copy.

        Several processes copy to the host, as Orbax needs their main threads.
        """
        if self._on_devices is None:
            self._on_devices = hosts.is_alone() and has_room(arrays)
            if hosts.is_alone() and not self._on_devices:
                size = sum(array.nbytes for array in arrays.values()) / 2**30
                log.warning("saving waits until %.1f GiB are on the host: the devices have "
                            "no room for a copy", size)  # fmt: skip
        return self._on_devices

    def _find(self, step: int | None) -> tuple[int, dict[int, list[str]]]:
        """The step to read, and the damaged ones passed over."""
        if self._saving:
            self._saving.join()
        available = self.steps()
        if not available or step not in [None, *available]:
            raise CheckpointError(
                f"{self.folder} has no {'checkpoint' if step is None else f'step {step}'}; "
                f"its steps are {available}"
            )
        damaged: dict[int, list[str]] = {}
        for candidate in reversed(available) if step is None else [step]:
            problems = self._problems(candidate)
            if not problems:
                return candidate, damaged
            log.warning("step %d is damaged: %s", candidate, "; ".join(problems))
            damaged[candidate] = problems
        reasons = (f"step {bad}: {'; '.join(problems)}" for bad, problems in damaged.items())
        raise CheckpointError(f"no good checkpoint in {self.folder}: {'. '.join(reasons)}")

    def _problems(self, step: int) -> list[str]:
        found = verify_manifest(folders.committed(self.folder, step)) if hosts.is_first() else []
        if hosts.any_true(bool(found)):
            return found or ["the first process found damage"]
        return []

    def _read(self, step: int, wanted: dict[str, PyTree]) -> dict[str, jax.Array]:
        like = {name: leaves.abstract(leaf) for name, leaf in wanted.items()}
        try:
            return read_arrays(folders.committed(self.folder, step) / "state", like)
        except Exception as error:
            raise CheckpointError(f"step {step} is whole but cannot be read: {error}") from error

    def _failed(self, step: int, error: Exception | None) -> CheckpointError:
        good = next((old for old in reversed(self.steps()) if not self._problems(old)), None)
        return CheckpointError(
            f"saving step {step} failed: {error or 'another process failed'}; "
            + ("no good step is left" if good is None else f"the newest good step is {good}")
        )


def _checked(step: int) -> int:
    """Raises ValueError unless `step` is a whole number from 0 on."""
    try:
        number = operator.index(step)
    except TypeError:
        raise ValueError(f"step is {step!r}: it must be a whole number") from None
    if number < 0:
        raise ValueError(f"step is {number}: it must be 0 or more")
    return number
