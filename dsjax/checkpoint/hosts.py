"""What the processes of a multi-host run must agree on; with one process, nothing to do.

These are collectives: every process calls them, in the same order, from its main thread.
"""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_alone() -> bool:
    """Whether this is the only process, so that no collective needs its main thread."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this process writes what exists once: folders, notes, manifest, renames."""
    return jax.process_index() == 0


def share(number: int) -> int:
    """The first process's `number` (31 bits), on every process."""
    if is_alone():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def any_true(flag: bool) -> bool:
    """Whether `flag` is set on any process; also a barrier."""
    if is_alone():
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
