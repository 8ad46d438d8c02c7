"""One step on its way to disk."""

import logging
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path

import jax

from dsjax.checkpoint import folders, hosts, notes
from dsjax.checkpoint.arrays import ArrayWriter
from dsjax.checkpoint.manifest import write_durably, write_manifest
from dsjax.checkpoint.snapshot import Snapshot

log = logging.getLogger("dsjax.checkpoint")


class Save:
    """Arrays are copied by `start`; a thread writes, seals and commits them and prunes.

    The copy is on the host, or on the devices for the thread to fetch.
    """

    def __init__(
        self, writer: ArrayWriter, folder: Path, step: int, content: bytes, keep: int
    ) -> None:
        """Plan to write the arrays and, as its notes, `content`; keep the `keep` newest steps."""
        self.step = step
        self._writer = writer
        self._folder = folder
        self._content = content
        self._keep = keep
        self._partial = folders.partial(folder, step, hosts.share(secrets.randbits(31)))
        self._snapshot: Snapshot | None = None
        self._lock: int | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="dsjax-checkpoint")

    def start(self, arrays: Mapping[str, jax.Array], *, on_devices: bool = False) -> None:
        """Copy the arrays to the host, or `on_devices` if those have the room.

        Raises what Orbax or the disk raises, leaving nothing.
        """
        try:
            self._make_folder()
            if on_devices:
                self._snapshot = self._copy_on_devices(arrays)
            if self._snapshot is None:
                self._writer.start(self._partial / "state", arrays)
            self._thread.start()
        except BaseException:
            self._drop()
            self._unlock()
            raise

    def join(self) -> Exception | None:
        """Wait for the end and return the error, if there was one; may be called again."""
        self._thread.join()
        return self._error

    def _make_folder(self) -> None:
        error: OSError | None = None
        if hosts.is_first():
            try:
                self._lock = folders.make_locked(self._partial)
            except OSError as reason:
                error = reason
        if hosts.any_true(error is not None):
            raise error or OSError("the first process could not make the folder")

    def _copy_on_devices(self, arrays: Mapping[str, jax.Array]) -> Snapshot | None:
        try:
            return Snapshot(arrays)
        except jax.errors.JaxRuntimeError as error:
            log.warning("step %d is copied to the host at once: %s", self.step, error)
            return None

    def _run(self) -> None:
        try:
            if self._snapshot is not None:
                self._writer.start_from_host(self._partial / "state", self._snapshot.fetch())
            self._writer.wait()
            if hosts.is_first():
                self._commit()
        except Exception as error:
            log.warning("saving step %d failed: %s", self.step, error)
            self._error = error
            self._drop()
        finally:
            self._unlock()

    def _commit(self) -> None:
        write_durably(self._partial / notes.NAME, self._content)
        write_manifest(self._partial)
        folders.publish(self._partial, folders.committed(self._folder, self.step))
        try:
            folders.prune(self._folder, self._keep, spare=self.step)
        except OSError as error:
            log.warning("old steps could not be removed: %s", error)

    def _drop(self) -> None:
        if hosts.is_first():
            folders.discard(self._partial)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
