"""Figures of a run: one JSON line a step, and the same for TensorBoard.

Device arrays are read some steps after their step was dispatched, so that reading never holds the
device up.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
from tensorboardX import SummaryWriter

STEPS_BEHIND = 2
WINDOW = 10
JSONL = "metrics.jsonl"


class Diverged(RuntimeError):
    """A loss or gradient stopped being a finite number."""


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events in a folder; lines after `start` are dropped."""

    def __init__(self, folder: Path, start: int):
        path = folder / JSONL
        kept = [line for line in read_lines(path) if line["step"] <= start] if start else []
        self._written = {(line["kind"], line["step"]) for line in kept}
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record; what an earlier part of the run has written already stays as it is."""
        if (kind, step) in self._written:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class NoLog:
    """Takes figures and keeps none: the first of several processes writes them."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _replace(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a last line cut short by a kill is left out."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


class Goodput:
    """How much of a process's time went into steps, counted from the end of its first one.

    That leaves compilation out. Of the seconds from there to the last step, `eval_seconds` went
    into evaluations; the rest is the time of training. In `save_seconds` of that the loop was
    held up by saving: all steps were done and the devices idle while it waited for the save
    before, for the state to be copied and for its writing to start.

        goodput = 1 - save_seconds / time of training

    What a save in the background slows down is in `tokens_per_second`, over all of the time of
    training, but not in `goodput`.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self.tokens_per_second: float | None = None
        """Of all steps but the first, None before there is one."""
        self._begin: float | None = None
        self._tokens = 0
        self._spent = {"save": 0.0, "eval": 0.0}

    def spend(self, what: Literal["save", "eval"], seconds: float) -> None:
        self._spent[what] += seconds

    def step_done(self, now: float, tokens: int) -> dict[str, float]:
        """Take in a step that is done at `now` (seconds); returns what its record is to say."""
        if self._begin is None:
            self._begin = now
        else:
            self._tokens += tokens
        if training := now - self._begin - self._spent["eval"]:
            self.tokens_per_second = self._tokens / training
            self.share = 1 - self._spent["save"] / training
        return {"goodput": self.share} | {f"{k}_seconds": v for k, v in self._spent.items()}


class Pending:
    """Metrics of dispatched steps, handed out as numbers a few steps later.

    Times are means over the last `WINDOW` steps: one step's own would tell when the host looked,
    not when the device was done.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[int, int, dict[str, jax.Array]]] = deque()
        self.goodput = Goodput()
        self._compiled = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the coming steps' times what was not theirs."""
        self._seen = deque([(time.perf_counter(), 0)], maxlen=WINDOW + 1)

    @contextmanager
    def apart(self, what: Literal["save", "eval"]) -> Generator[None]:
        """Count what is done inside as `what`, and leave it out of the steps' times."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.goodput.spend(what, time.perf_counter() - begin)
            self.restart_clock()

    def add(self, step: int, tokens: int, metrics: dict[str, jax.Array]) -> None:
        self._queue.append((step, tokens, metrics))

    def ready(self, behind: int = STEPS_BEHIND) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every step but the newest `behind`; raises Diverged at one that is not finite."""
        while len(self._queue) > behind:
            step, tokens, arrays = self._queue.popleft()
            # All at once: beside a save each look would wait for a piece of the state.
            values = {name: value.tolist() for name, value in jax.device_get(arrays).items()}
            yield step, values | {"tokens": tokens} | self._times(tokens)
            for name in ("loss", "mtp_loss", "grad_norm"):
                if not math.isfinite(values[name]):
                    raise Diverged(f"{name} is {values[name]} at step {step}")

    def _times(self, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        self._seen.append((now, tokens))
        seconds = self._seen[-1][0] - self._seen[0][0]
        steps, total = len(self._seen) - 1, sum(count for _, count in list(self._seen)[1:])
        if not self._compiled:  # the first step waits for the compiler
            self._compiled = True
            self.restart_clock()
        rates = {"step_seconds": seconds / steps, "tokens_per_second": total / seconds}
        return rates | self.goodput.step_done(now, tokens)
