"""What a device did in traced steps: a profile of `jax.profiler` as operations and their times.

* On GPUs all that ran on a stream counts: kernels, copies, fills. Where a profile has no GPU in it,
  as on a CPU, the instructions of the compiled step count, over all threads together.
* At each moment time goes to the operation that began last, so that a loop is not paid for what it
  runs, nor a moment twice where operations overlap: the times add up to the time that the device
  worked. A profile of several devices gives their mean.
"""

from __future__ import annotations

import heapq
import itertools
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from dsjax.train.hlo import op_names
from dsjax.train.kinds import is_fp8, kind_of, scope_of


class Event(NamedTuple):
    """One call of an operation; nanoseconds, and the bytes that it moved if the profile tells."""

    start: float
    end: float
    name: str
    op_name: str = ""
    bytes: int | None = None


@dataclass(frozen=True)
class Operation:
    """All calls of a name in a scope, numbered names as one; calls and seconds a step."""

    name: str
    kind: str
    scope: str
    calls: float
    seconds: float
    bytes: float | None
    """Moved in a step; None unless the profile tells for every call."""
    fp8: bool


@dataclass(frozen=True)
class Timeline:
    """Of a step on one device; empty where the profile shows nothing."""

    seconds: float
    """From the first operation's start to the last one's end, over the steps traced."""
    operations: list[Operation]
    """The longest first."""
    devices: int
    """Whose mean it is; on a CPU one, however many jax makes of it."""

    @property
    def busy(self) -> float:
        """Seconds of a step in which an operation ran."""
        return sum(operation.seconds for operation in self.operations)


def trace(work: Callable[[], Any], steps: int, compiled: jax.stages.Compiled) -> Timeline:
    """Trace `work`, which runs `steps` of the compiled step and waits for the last."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0 if jax.default_backend() == "gpu" else 2
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            work()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        profiles = [ProfileData.from_file(str(file)) for file in files[:1]]
    hlo = compiled.as_text() or ""
    return timeline([device for profile in profiles for device in read(profile, hlo)], steps)


def read(profile: ProfileData, hlo: str) -> Iterator[list[Event]]:
    """The events of every device in a profile of the compiled program with this text."""
    found = op_names(hlo).items()
    # Kernels have "_" for what is no letter in the names of instructions.
    known = {re.sub(r"\W", "_", name): op_name for name, op_name in found}
    module = hlo.split(",", 1)[0].removeprefix("HloModule ")
    gpus = [plane for plane in profile.planes if "GPU" in plane.name]
    for plane in gpus:
        streams = [line for line in plane.lines if "Stream" in line.name]
        if events := [_event(event, known) for line in streams for event in line.events]:
            yield events
    if not gpus:
        events = []
        for event in (e for p in profile.planes for line in p.lines for e in line.events):
            if (stats := dict(event.stats)).get("hlo_module") == module and "hlo_op" in stats:
                events.append(_event(event, known))
        if events:
            yield events


def _event(event: Any, known: dict[str, str]) -> Event:
    stats = dict(event.stats)
    names = (str(stats.get("hlo_op", "")).split("::")[-1], event.name)
    keys = (re.sub(r"\W", "_", name) for name in names)
    told = str(stats.get("name") or stats.get("tf_op") or "").rstrip(":")
    op_name = next((known[key] for key in keys if key in known), told if "/" in told else "")
    size = re.search(r"\bsize:(\d+)", str(stats.get("memcpy_details", "")))
    start, end = event.start_ns, event.start_ns + event.duration_ns
    return Event(start, end, event.name, op_name, int(size[1]) if size else None)


def timeline(devices: Sequence[Sequence[Event]], steps: int) -> Timeline:
    """Events of each device over `steps` steps, as operations of one step on one device."""
    if not devices:
        return Timeline(0.0, [], 0)
    share, grouped = 1 / steps / len(devices), defaultdict(list)
    for events in devices:
        for event, seconds in zip(events, own_seconds(events), strict=True):
            name = re.sub(r"([._]\d+)+$", "", event.name)
            key = name, kind_of(event.name, event.op_name), scope_of(event.op_name)
            grouped[key].append((seconds, event.bytes))
    operations = []
    for (name, kind, scope), calls in grouped.items():
        sizes = [size for _, size in calls if size is not None]
        whole = len(sizes) == len(calls)
        operations.append(Operation(
            name, kind, scope, len(calls) * share, sum(seconds for seconds, _ in calls) * share,
            sum(sizes) * share if whole else None, is_fp8(name),
        ))  # fmt: skip
    spans = [max(e.end for e in events) - min(e.start for e in events) for events in devices]
    operations.sort(key=lambda operation: -operation.seconds)
    return Timeline(sum(spans) * 1e-9 * share, operations, len(devices))


def own_seconds(events: Sequence[Event]) -> list[float]:
    """Of each event: how long it was the one that began last of those that ran."""
    order = sorted(range(len(events)), key=lambda i: (events[i].start, -events[i].end))
    moments = sorted({moment for event in events for moment in event[:2]})
    own, running, begun = [0.0] * len(events), [], 0
    for now, then in itertools.pairwise(moments):
        while begun < len(order) and events[order[begun]].start <= now:
            heapq.heappush(running, -begun)
            begun += 1
        while running and events[order[-running[0]]].end <= now:
            heapq.heappop(running)
        if running:
            own[order[-running[0]]] += (then - now) * 1e-9
    return own
