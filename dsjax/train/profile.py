"""A few steps of a run, measured: speed by the clock, memory, and where the time goes.

The step is compiled once and runs on the run's own batches, of full size. After `WARM` steps come
those that are timed, dispatched as in training, and as many that are traced, which may take longer:
the profiler does not let a GPU run captured graphs.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import jax
import numpy as np

from dsjax.config import Run
from dsjax.model.sizes import training_work
from dsjax.train.memory import Memory, measure_memory
from dsjax.train.metrics import STEPS_BEHIND
from dsjax.train.peak import device_peak, utilisation
from dsjax.train.runtime import Runtime, load_corpus
from dsjax.train.stop import StopRequest
from dsjax.train.trace import Timeline, trace
from dsjax.train.work import KindTime, by_kind, flops_by_kind, with_matmuls_told

WARM = 2


@dataclass(frozen=True)
class Profile:
    run: Run
    steps: int
    """Timed, and as many traced."""
    tokens: int
    """Of a step, over all devices."""
    seconds: float
    """Of a step, by the clock."""
    memory: Memory
    timeline: Timeline

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @functools.cached_property
    def utilisation(self) -> dict[str, float]:
        """As in a run's metrics."""
        work = training_work(self.run.model, self.run.data.seq_len)
        return utilisation(self.tokens_per_second, work)

    @functools.cached_property
    def kinds(self) -> list[KindTime]:
        """What the time of a traced step went to."""
        here = jax.local_device_count() / jax.device_count() / max(self.timeline.devices, 1)
        each = flops_by_kind(self.run.model, self.run.data.seq_len)
        flops = {kind: count * self.tokens * here for kind, count in each.items()}
        return by_kind(self.timeline, flops, device_peak())


def profile(run: Run, steps: int, say: Callable[[str], None] = print) -> Profile:
    """Measure `steps` steps of the run; `say` is told what goes on.

    Raises ValueError for steps below 1 and for what no run could train on, KeyboardInterrupt after
    the step, or the compilation, in which Ctrl-C or SIGTERM came.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: time at least 1")
    first = run.train.steps  # by then a growing batch has grown
    with StopRequest() as stop:
        runtime = Runtime(run, load_corpus(run))
        shown = runtime.stream.batch(first)
        say("compiling the step")
        stepping = _Stepping(runtime, shown)
        batches = map(runtime.put, runtime.stream.iterate(first, first + WARM + 2 * steps))
        stepping.run(islice(batches, WARM), stop)
        say(f"timing {_count(steps)}")
        start = time.perf_counter()
        stepping.run(islice(batches, steps), stop)
        seconds = (time.perf_counter() - start) / steps
        memory = measure_memory(runtime.abstract, runtime.put(shown), stepping.compiled)
        say(f"tracing {_count(steps)}")
        ready = list(batches)
        timeline = trace(lambda: stepping.run(ready, stop), steps, stepping.compiled)
    tokens = shown.shape[0] * run.data.seq_len * jax.process_count()
    return Profile(run, steps, tokens, seconds, memory, with_matmuls_told(timeline))


class _Stepping:
    """The compiled step and its state; as in training the host is a few steps ahead at most."""

    def __init__(self, runtime: Runtime, batch: np.ndarray):
        self.compiled = runtime.compile_step(batch)
        self._state = runtime.initial()

    def run(self, batches: Iterable[tuple[jax.Array, ...]], stop: StopRequest) -> None:
        """A step for each of the batches, on devices; returns when the last one is done."""
        ahead = deque()
        for batch in batches:
            _check(stop)
            self._state, metrics = self.compiled(self._state, *batch)
            ahead.append(metrics)
            if len(ahead) > STEPS_BEHIND:
                jax.block_until_ready(ahead.popleft())
        jax.block_until_ready(self._state)
        _check(stop)


def _check(stop: StopRequest) -> None:
    if stop.requested:
        raise KeyboardInterrupt


def _count(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"
