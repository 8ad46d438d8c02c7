"""Arrays to and from disk: the only file that names Orbax.

Orbax copies the arrays to the host before `start` returns and writes them in a thread of its
own. One flat dict of leaves goes in, so that no container type ends up in the file format.
"""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

WRITE_LIMIT_S = 3600

_ORBAX = str(Path(ocp.__file__).parent)


def _worth_reading(record: logging.LogRecord) -> bool:
    """Of what Orbax logs only warnings: the rest is narration, or an error that it raises too."""
    return record.levelno == logging.WARNING or not record.pathname.startswith(_ORBAX)


logging.getLogger("absl").addFilter(_worth_reading)


class ArrayWriter:
    """Writes one set of arrays at a time in the background."""

    def __init__(self) -> None:
        options = ocp.AsyncOptions(timeout_secs=WRITE_LIMIT_S)
        self._orbax = ocp.StandardCheckpointer(async_options=options)

    def start(self, folder: Path, leaves: dict[str, jax.Array]) -> None:
        """Copy the arrays out and start to write them; may raise whatever Orbax raises."""
        self._orbax.save(folder, leaves)

    def wait(self) -> None:
        """Return once everything is on disk; re-raises the error of the write."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        self._orbax.close()


def read_arrays(folder: Path, like: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the arrays straight into the shardings of `like`; may raise whatever Orbax raises."""
    with ocp.StandardCheckpointer() as orbax:
        return orbax.restore(folder, like)
