"""The training run: resume, step, log, evaluate, save, stop."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from dsjax.checkpoint import CheckpointStore, hosts
from dsjax.config import Run
from dsjax.data import JsonTokenizer, held_out_text
from dsjax.model.sizes import training_work
from dsjax.parallel.multihost import failing_fast, require_same, require_shared
from dsjax.train.console import TrainProgress
from dsjax.train.evaluate import Evaluation
from dsjax.train.metrics import Diverged, MetricsLog, NoLog, Pending
from dsjax.train.notes import as_notes, differences, from_notes
from dsjax.train.peak import peak_memory_bytes, utilisation
from dsjax.train.plots import draw
from dsjax.train.runtime import Corpus, Runtime, load_corpus
from dsjax.train.step import TrainState
from dsjax.train.stop import StopRequest

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended; `evaluation` is missing when a signal stopped it early."""

    run: Run
    corpus: Corpus
    state: TrainState
    step: int
    stopped_by: str | None
    evaluation: Evaluation | None
    pictures: list[Path]


def train(run: Run, out: Path, *, resume: bool = False, console: Console | None = None) -> Outcome:
    """Train `run` in the folder `out`, from the newest good checkpoint there if `resume`.

    Raises ValueError for bad input, CheckpointError (a ValueError) for one that cannot be written
    or restored, Diverged when a loss is not finite. Of several processes all call it; the first
    one prints and writes.
    """
    require_same("settings", repr((run, resume)))
    require_shared(out)
    runtime = Runtime(run, load_corpus(run))
    require_same("text", runtime.corpus.fingerprint)
    checkpoints = CheckpointStore(out / CHECKPOINTS, keep=run.train.keep)
    with checkpoints as store, StopRequest() as stop, failing_fast():
        if store.steps() and not resume:
            raise ValueError(f"{out} already holds a run: add --resume, or choose another --out")
        if hosts.is_first():
            _keep_tokenizer(runtime.corpus, out)
        else:
            console = Console(quiet=True)
        session = _Session(runtime, out, store, stop, console or Console())
        return session.run_to_end()


def _keep_tokenizer(corpus: Corpus, out: Path) -> None:
    if isinstance(corpus.tokenizer, JsonTokenizer) and not (out / TOKENIZER).exists():
        shutil.copyfile(corpus.tokenizer.path, out / TOKENIZER)


def xz_bits_per_byte(run: Run) -> float:
    """What `xz -9` makes of the same held-out text, in bits a byte."""
    text = held_out_text(run.data)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


class _Session:
    """One process's part of a run, from start or resume to end or stop."""

    def __init__(
        self,
        runtime: Runtime,
        out: Path,
        store: CheckpointStore,
        stop: StopRequest,
        console: Console,
    ):
        self.runtime, self.run, self.out = runtime, runtime.run, out
        self.store, self.stop = store, stop
        self.state, self.start = self._begin(console)
        self.progress = TrainProgress(console, self.start, self.run.train.steps)
        self.metrics = MetricsLog(out, self.start) if hosts.is_first() else NoLog()
        self.pending = Pending()
        self.work = training_work(self.run.model, self.run.data.seq_len)
        self.saved = self.start

    def _room(self) -> str:
        room = self.run.exchange.room
        return "" if room is None else f" (a sign, too, of too little room: exchange.room={room})"

    def run_to_end(self) -> Outcome:
        step, evaluation = self.start, None
        try:
            with self.progress:
                for step in self._steps():  # noqa: B007
                    if self.stop.requested:
                        break
                self._say_goodput()
                self._save(step)
                if step == self.run.train.steps:
                    evaluation = self._evaluate(step, None)
            self.store.wait()
        except Diverged as problem:
            self.store.wait()
            good = self.store.steps()
            kept = f"{self.out / CHECKPOINTS} step {good[-1]}" if good else "none was saved yet"
            raise Diverged(f"{problem}{self._room()}; last good checkpoint: {kept}") from None
        finally:
            self.metrics.close()
        pictures = draw(self.out) if hosts.is_first() else []
        return Outcome(self.run, self.runtime.corpus, self.state, step, self.stop.requested,
                       evaluation, pictures)  # fmt: skip

    def _steps(self) -> Iterator[int]:
        train = self.run.train
        batches = self.runtime.stream.iterate(self.start, train.steps)
        for step, batch in enumerate(batches, start=self.start + 1):
            self.state, metrics = self.runtime.step(self.state, batch)
            tokens = batch.shape[0] * (batch.shape[1] - 1) * jax.process_count()
            self.pending.add(step, tokens, metrics | self.stop.notice())
            self._report()
            last = step == train.steps
            if step % train.eval_every == 0 and not last:
                self._evaluate(step, train.eval_batches)
            if step % train.save_every == 0 and not last:
                self._save(step)
            yield step

    def _report(self, behind: int | None = None) -> None:
        ready = self.pending.ready() if behind is None else self.pending.ready(behind)
        for step, values in ready:
            self.stop.hear(values)
            if hosts.is_first():
                self._record(step, values)

    def _record(self, step: int, values: dict[str, Any]) -> None:
        values |= utilisation(values["tokens_per_second"], self.work)
        if memory := peak_memory_bytes():
            values["peak_memory_gib"] = memory / 2**30
        self.metrics.write("train", step, values)
        self.progress.step(step, values)

    def _evaluate(self, step: int, batches: int | None) -> Evaluation:
        self._report(behind=0)
        with self.pending.apart("eval"):
            result = self.runtime.evaluate(self.state, batches)
            values = {**vars(result), "max_vio_global": result.max_vio_global}
            self.metrics.write("eval", step, values)
            self.progress.say(
                f"step {step}: held out {result.bits_per_byte:.3f} bits per byte, "
                f"MaxVio_global {result.max_vio_global:.2f}"
            )
        return result

    def _save(self, step: int) -> None:
        """Start writing a checkpoint of a state all of whose steps are known to be finite."""
        self._report(behind=0)
        with self.pending.apart("save"):
            if step > self.saved:
                self.store.save(step, self.state._asdict(), self._notes(step))
                self.saved = step

    def _say_goodput(self) -> None:
        """Of the steps: the save after the last of them holds none up."""
        self._report(behind=0)
        if rate := self.pending.goodput.tokens_per_second:
            self.progress.say(
                f"{rate:,.0f} tokens/s over the whole run, saving included and evaluation not; "
                f"goodput {self.pending.goodput.share:.2%}"
            )

    def _notes(self, step: int) -> dict[str, Any]:
        return {
            "run": as_notes(self.run),
            "data": {"next_batch": step, "fingerprint": self.runtime.corpus.fingerprint},
            "rng": {"seed": self.run.train.seed},
        }

    def _begin(self, console: Console) -> tuple[TrainState, int]:
        """Fresh state, or that of the newest good checkpoint."""
        if not self.store.steps():
            return self.runtime.initial(), 0
        _, notes = self.store.read_meta()
        before = as_notes(from_notes(notes["run"]))
        if changed := differences(before, as_notes(self.run)):
            raise ValueError(
                f"{self.out} was started with other settings ({'; '.join(changed)}): resume it "
                "with its own, or choose another --out"
            )
        if notes["data"]["fingerprint"] != self.runtime.corpus.fingerprint:
            raise ValueError(
                f"the corpus has changed since {self.out} was started: bring the same "
                "text back, or choose another --out"
            )
        restored = self.store.restore(self.runtime.abstract._asdict())
        for step, problems in restored.skipped.items():
            console.print(f"checkpoint {step} is damaged and was passed over: {problems[0]}")
        console.print(f"resuming after step {restored.step}", highlight=False)
        return TrainState(**restored.state), restored.step
