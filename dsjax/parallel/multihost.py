"""Several processes, on one host or many, that train as one: start, agreement and end.

jax ends a process with a C++ stack trace when another does not come, and lets a process that
failed wait minutes for the others at its exit; here both end with one line that says why.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsjax.parallel.launch import TIMEOUT, Launch, read_launch, read_timeout

GRACE_S = 10.0
"""How long a process that failed waits for the others to end with it."""
LONGEST_END_S = 3600
"""How long the others wait at the end for the first one's pictures and sample."""


def start() -> Launch:
    """Join the processes that the environment names; with none named, nothing is done.

    To be called before jax is asked for a device. Raises ValueError for an environment that is
    half-set or contradicts itself, RuntimeError if the coordinator cannot be reached or started;
    a process that waits in vain for another one ends, with exit code 1.
    """
    launch, timeout = read_launch(), read_timeout()
    if launch.count == 1 or jax.distributed.is_initialized():
        return launch
    begin = time.monotonic()
    if launch.index:
        _reach(launch, timeout)
    else:
        _require_free_port(launch)
    left = max(timeout - (time.monotonic() - begin), 1.0)
    # The notifier of preemptions takes SIGTERM away from whoever had it.
    jax.config.update("jax_enable_preemption_service", False)
    waited = f"{launch}: not all processes came within {timeout:.0f} s ({TIMEOUT} sets the wait)"
    timer = _end_in(left, waited)
    try:
        _initialize(launch, left)
    finally:
        timer.cancel()
    return launch


def _initialize(launch: Launch, timeout: float) -> None:
    """Raises RuntimeError if jax cannot start; its own limit would end in a stack trace."""
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.count,
            launch.index,
            launch.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout + GRACE_S) + 1,
            shutdown_timeout_seconds=LONGEST_END_S,
        )
    except RuntimeError as problem:
        raise RuntimeError(f"{launch}: cannot start: {problem}") from problem


def _require_free_port(launch: Launch) -> None:
    """Raises RuntimeError where jax would end with a segmentation fault."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    host, _, port = (bind or str(launch.coordinator)).rpartition(":")
    try:
        socket.create_server((host.strip("[]") if bind else "", int(port))).close()
    except OSError as problem:
        raise RuntimeError(
            f"{launch}: cannot listen at port {port} ({problem.strerror}): choose another port, "
            "for all processes, unless another process 0 runs here"
        ) from problem


def _reach(launch: Launch, timeout: float) -> None:
    """Return once something listens where the coordinator should; else RuntimeError."""
    host, _, port = str(launch.coordinator).rpartition(":")
    limit = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as problem:
            if time.monotonic() > limit:
                raise RuntimeError(
                    f"{launch}: no coordinator answers after {timeout:.0f} s ({problem}): start "
                    f"process 0 on that host and let its port through ({TIMEOUT} sets the wait)"
                ) from problem
        time.sleep(0.2)


@contextmanager
def failing_fast() -> Generator[None]:
    """After an error inside, this process ends within `GRACE_S`, be it alone or with the others.

    The others may be in a collective, and this one would wait for them on its way out.
    """
    try:
        yield
    except BaseException as problem:
        if jax.distributed.is_initialized():
            what = f"{type(problem).__name__}: {problem}" if str(problem) else repr(problem)
            _end_in(GRACE_S, f"ending without the other processes after {what}")
        raise


def _end_in(seconds: float, message: str) -> threading.Timer:
    timer = threading.Timer(seconds, _end, (message,))
    timer.daemon = True
    timer.start()
    return timer


def _end(message: str) -> None:
    with suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(1)


def require_shared(folder: Path) -> None:
    """Raises ValueError on every process unless all see what the first writes in the folder.

    A collective, as `require_same` is.
    """
    if jax.process_count() == 1:
        return
    token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    marker = folder / f".shared-{token:08x}"
    if jax.process_index() == 0:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
    multihost_utils.process_allgather(np.int32(0))
    blind = _processes_with(not marker.exists())
    if jax.process_index() == 0:
        marker.unlink(missing_ok=True)
    if 0 in blind:
        raise ValueError(f"process 0 cannot write to {folder}")
    if blind:
        raise ValueError(
            f"{folder} is not the same folder everywhere: processes {blind} do not see what "
            "process 0 writes there; choose an --out on storage that all hosts share"
        )


def require_same(what: str, text: str) -> None:
    """Raises ValueError on every process unless `text` is equal on all of them."""
    if jax.process_count() == 1:
        return
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
    first = multihost_utils.broadcast_one_to_all(own)
    if others := _processes_with(not np.array_equal(own, first)):
        raise ValueError(f"processes {others} have other {what} than process 0: give all the same")


def _processes_with(flag: bool) -> list[int]:
    """Which processes say so: one answer for all of them."""
    return np.flatnonzero(multihost_utils.process_allgather(np.int32(flag))).tolist()
