"""Ctrl-C and SIGTERM ask a run to stop after its step; a second Ctrl-C interrupts at once.

A signal to one of several processes stops them all after the same step: each step takes along what
each process has been asked, and what came of it is read when the step's metrics are.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

NOTICE = "stop_signal"


class StopRequest:
    """While entered, `requested` names the signal that came, if one did."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._asked = 0
        self._alone = jax.process_count() == 1
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # ty: ignore[invalid-argument-type]

    def notice(self) -> dict[str, jax.Array]:
        """What goes with a step's metrics; of several processes, all must call it."""
        return {} if self._alone else {NOTICE: _largest(self._asked)}

    def hear(self, metrics: dict[str, Any]) -> None:
        """Take a step's notice out of its metrics, and heed it."""
        if number := metrics.pop(NOTICE, 0):
            self.requested = signal.Signals(number).name

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number
        if self._alone:
            self.requested = signal.Signals(number).name


def _largest(number: int) -> jax.Array:
    """The largest of the processes' numbers, worked out on the devices: nothing waits for it."""
    divided, largest = _on_all_devices()
    own = np.full(jax.local_device_count(), number, np.int32)
    return largest(jax.make_array_from_process_local_data(divided, own))


@functools.cache
def _on_all_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("all",))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    return NamedSharding(mesh, P("all")), largest
