"""Arrays to and from disk: the only file that names Orbax.

Orbax copies jax arrays to the host before `start` returns, all of them at once, and writes in
threads of its own. It may be called from any thread: it runs an event loop of its own each time.
One flat dict of leaves goes in, so that no container type ends up in the file format.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

WRITE_LIMIT_S = 3600
CHUNK_BYTES = 1 << 28
"""Of a numpy array on disk: chunks are compressed, and read by several devices, in parallel."""

_ORBAX = str(Path(ocp.__file__).parent)


def _worth_reading(record: logging.LogRecord) -> bool:
    """Of what Orbax logs only warnings: the rest is narration, or an error that it raises too."""
    return record.levelno == logging.WARNING or not record.pathname.startswith(_ORBAX)


logging.getLogger("absl").addFilter(_worth_reading)


class _Final(np.ndarray):
    """An array that nobody changes any more: Orbax would write a copy of any other."""

    def __deepcopy__(self, memo: dict[int, Any] | None, /) -> Self:
        return self


class ArrayWriter:
    """Writes one set of arrays at a time in the background."""

    def __init__(self) -> None:
        options = ocp.AsyncOptions(timeout_secs=WRITE_LIMIT_S)
        self._orbax = ocp.StandardCheckpointer(async_options=options)

    def start(self, folder: Path, leaves: Mapping[str, jax.Array]) -> None:
        """Copy the arrays out and start to write them; may raise whatever Orbax raises."""
        self._orbax.save(folder, dict(leaves))

    def start_from_host(self, folder: Path, leaves: Mapping[str, np.ndarray]) -> None:
        """Start to write arrays that stay as they are; may raise whatever Orbax raises."""
        final = {name: leaf.view(_Final) for name, leaf in leaves.items()}
        chunks = dict.fromkeys(leaves, ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES))
        self._orbax.save(folder, final, save_args=chunks)

    def wait(self) -> None:
        """Return once everything is on disk; re-raises the error of the write."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        self._orbax.close()


def read_arrays(folder: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the arrays straight into the shardings of `like`; may raise whatever Orbax raises."""
    with ocp.StandardCheckpointer() as orbax:
        return orbax.restore(folder, like)
