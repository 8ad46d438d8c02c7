"""Sustained time of a function of arrays on one device.

* The function is called on buffer sets in turn, more of them than fit in L2, by one jitted program
  that returns every output: equal calls would be merged, unused ones dropped.
* Before each reading the device works for 200 ms or more, until its clocks have settled: a card
  under FP8 load throttles, and cold figures read up to a fifth faster.
* Calls of 40 us or more are timed by the wall clock over 20 ms or more of programs dispatched back
  to back, the median of seven such stretches.
* The host cannot keep a card busy with shorter calls. There a profile of such a stretch is read:
  the length of the union of all intervals in which the card worked, divided by the calls. Kernels
  that overlap count once; the time the card waits for the host does not count.
* Functions that are compared are timed the same way, in turn over three passes, so that heat
  favours none: the median of the passes counts.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.profiler import ProfileData

from pallas_kernels.device import is_gpu

How = Literal["wall", "timeline"]


@dataclass(frozen=True)
class Method:
    """Seconds and bytes of the method above."""

    warm: float = 0.2
    stretch: float = 0.02
    stretches: int = 7
    passes: int = 3
    short_call: float = 40e-6
    on_card: bool = True

    @classmethod
    def for_device(cls, seconds: float) -> Method:
        """For seven stretches of `seconds` in all, of 20 ms at least on a card."""
        each = seconds / cls.stretches
        if is_gpu():
            return cls(stretch=max(each, cls.stretch))
        return cls(warm=0.0, stretch=each, on_card=False)


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the passes, and each of them."""

    seconds: float
    passes: tuple[float, ...]
    how: How


class NoTimeline(RuntimeError):
    """The profile does not show the device's work."""


class Program:
    """A function called once on each of several buffer sets, behind what all calls share."""

    def __init__(
        self, function: Callable[..., Any], sets: Sequence[Any], shared: Sequence[Any] = ()
    ):
        once = jax.jit(function)  # so that it is traced once, not for every set
        self._program = jax.jit(lambda shared, sets: [once(*shared, each) for each in sets])
        self._shared, self._sets, self._seconds = tuple(shared), list(sets), math.inf

    def on(self, sets: Sequence[Any], shared: Sequence[Any] = ()) -> Program:
        """The same on other arrays; what is compiled serves both where the shapes are equal."""
        other = copy.copy(self)
        other._shared, other._sets, other._seconds = tuple(shared), list(sets), math.inf
        return other

    @property
    def call_seconds(self) -> float:
        """Of the last stretch, by the wall clock."""
        return self._seconds / len(self._sets)

    def run(self, seconds: float) -> tuple[float, int]:
        """About that long of back-to-back programs: (seconds they took, calls)."""
        rounds = max(1, math.ceil(1.1 * seconds / self._seconds))
        out, start = None, time.perf_counter()
        for _ in range(rounds):
            out = self._program(self._shared, self._sets)
        jax.block_until_ready(out)
        elapsed = time.perf_counter() - start
        self._seconds = elapsed / rounds
        return elapsed, rounds * len(self._sets)

    def outputs(self) -> list[Any]:
        """Of one program, an output a set."""
        return jax.block_until_ready(self._program(self._shared, self._sets))

    def stretch(self, seconds: float) -> float:
        """Seconds a call over at least that long."""
        elapsed, calls = self.run(seconds)
        while elapsed < seconds:
            elapsed, calls = self.run(seconds)
        return elapsed / calls


def by_wall(program: Program, method: Method) -> float:
    return statistics.median(program.stretch(method.stretch) for _ in range(method.stretches))


def by_timeline(program: Program, method: Method) -> float:
    """Seconds a call that the device worked; NoTimeline if a profile does not show that."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            _, calls = program.run(method.stretch)
        found = sorted(Path(folder).rglob("*.xplane.pb"))
        intervals = device_work(ProfileData.from_file(str(found[0]))) if found else []
    if len(intervals) < calls:
        raise NoTimeline(f"a profile shows {len(intervals)} kernels of {calls} calls")
    return union_length(intervals) * 1e-9 / calls


def device_work(profile: ProfileData) -> list[tuple[float, float]]:
    """(start, end) in ns of all that the streams of the GPUs did."""
    return [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    ]


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of all that the intervals (start, end) cover; what several cover counts once."""
    total, covered = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def interleaved(programs: dict[str, Program], method: Method) -> dict[str, Timing]:
    """Time programs of one kind beside each other, in that order in every pass."""
    for program in programs.values():
        program.outputs()  # compiles
        program.stretch(method.warm)
    shortest = min(program.call_seconds for program in programs.values())
    if method.on_card and shortest < method.short_call:
        try:
            return _passes(programs, method, "timeline")
        except NoTimeline:
            pass  # wall clock for all of them, as their Timing says
    return _passes(programs, method, "wall")


def _passes(programs: dict[str, Program], method: Method, how: How) -> dict[str, Timing]:
    read = by_timeline if how == "timeline" else by_wall
    readings: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(method.passes):
        for name, program in programs.items():
            program.stretch(method.warm)
            readings[name].append(read(program, method))
    return {
        name: Timing(statistics.median(found), tuple(found), how)
        for name, found in readings.items()
    }
