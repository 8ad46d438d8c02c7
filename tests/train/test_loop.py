"""Whole runs: what they leave behind, how they stop, resume, fall back and diverge."""

import functools
import io
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint import CheckpointStore
from dsjax.checkpoint.snapshot import Snapshot
from dsjax.config import Exchange
from dsjax.data import TrainStream, batch_size
from dsjax.parallel import build_mesh
from dsjax.train import CHECKPOINTS, Diverged, Outcome, model_of, runtime, train, xz_bits_per_byte
from dsjax.train.restore import load_run
from dsjax.train.runtime import Runtime

STEPS = 8
LOSSES = ("loss", "mtp_loss", "sequence_aux", "batch_aux", "grad_norm", "learning_rate", "max_vio",
          "max_vio_layers")  # fmt: skip

pytestmark = pytest.mark.usefixtures("on_one_device")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def said(console: Console) -> str:
    return console.file.getvalue()


def lines(folder: Path, kind: str = "train") -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def figures(folder: Path) -> list[tuple]:
    """What must not depend on whether a run was interrupted."""
    return [(record["step"], *(record[name] for name in LOSSES)) for record in lines(folder)]


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / CHECKPOINTS).iterdir())


def damage(folder: Path, step: int) -> None:
    """Flip one bit of the largest file of a checkpoint."""
    files = (folder / CHECKPOINTS / f"{step:08d}").rglob("*")
    path = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def straight(tiny_run, tmp_path_factory, step_cache) -> Iterator[tuple[Path, Outcome, str]]:
    """A run of all steps, its outcome and what it printed; read it only."""
    folder, console = tmp_path_factory.mktemp("straight") / "run", quiet()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "build_mesh", functools.partial(build_mesh, devices=1))
        patch.setattr(runtime, "build_step", step_cache.build)
        outcome = train(tiny_run(), folder, console=console)
    return folder, outcome, said(console)


@pytest.fixture
def finished(straight, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(straight[0], tmp_path / "run"))


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal while it takes a step."""
    take = Runtime.step

    def take_and_signal(self, state, batch):
        if int(state.step) == step - 1:
            os.kill(os.getpid(), number)
        return take(self, state, batch)

    monkeypatch.setattr(Runtime, "step", take_and_signal)


def nan_from(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make every parameter NaN before a step."""
    take = Runtime.step

    def take_or_spoil(self, state, batch):
        if int(state.step) == step - 1:
            state = state._replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
        return take(self, state, batch)

    monkeypatch.setattr(Runtime, "step", take_or_spoil)


def test_metrics_have_one_line_a_step_with_all_figures(straight):
    records = lines(straight[0])
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    promised = {*LOSSES, "step_seconds", "tokens_per_second", "model_flops_per_second", "goodput",
                "save_seconds", "eval_seconds"}  # fmt: skip
    for record in records:
        assert promised <= record.keys()
        assert np.isfinite([np.mean(record[name]) for name in promised]).all()


def test_evaluations_come_on_time_and_at_the_end(straight):
    folder, outcome, _ = straight
    evaluations = lines(folder, "eval")
    assert [record["step"] for record in evaluations] == [4, STEPS]
    assert evaluations[-1]["bits_per_byte"] == outcome.evaluation.bits_per_byte
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def test_a_run_learns_and_says_so(straight):
    folder, _, text = straight
    records = lines(folder)
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert f"step {STEPS}/{STEPS}" in text
    assert "bits per byte" in text


def test_saves_and_evaluations_are_told_apart_from_steps(straight):
    folder, _, text = straight
    records = lines(folder)
    assert (records[0]["goodput"], records[0]["save_seconds"]) == (1.0, 0.0)
    assert 0 < records[-1]["goodput"] < 1
    for what, before in (("save", (2, 4, 6)), ("eval", (4,))):
        seconds = [record[f"{what}_seconds"] for record in records]
        grown = [n for n in range(1, STEPS) if seconds[n] > seconds[n - 1]]
        assert grown == list(before)  # what follows step n is first told by the record after it
    said_so = re.search(r"([\d,]+) tokens/s over the whole run, .*; goodput ([\d.]+)%", text)
    assert float(said_so[2]) == pytest.approx(100 * records[-1]["goodput"], abs=0.006)


def test_pictures_and_tensorboard_events_are_written(straight):
    folder, outcome, _ = straight
    assert {path.name for path in outcome.pictures} == {"loss.png", "balance.png", "load.png"}
    for path in outcome.pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
    events = list((folder / "tensorboard").glob("events.out.tfevents*"))
    assert len(events) == 1
    assert b"train/loss" in events[0].read_bytes()


def test_only_the_newest_checkpoints_are_kept(straight):
    assert saved_steps(straight[0]) == [4, 6, 8]


def test_stopped_and_resumed_run_is_bit_equal_to_a_straight_one(
    straight, tiny_run, tmp_path, monkeypatch, same_bits
):
    with monkeypatch.context() as patch:
        signal_at(patch, 5, signal.SIGTERM)
        stopped = train(tiny_run(), tmp_path / "run", console=quiet())
    assert (stopped.step, stopped.stopped_by, stopped.evaluation) == (5, "SIGTERM", None)
    assert saved_steps(tmp_path / "run")[-1] == 5
    resumed = train(tiny_run(), tmp_path / "run", resume=True, console=quiet())
    assert resumed.stopped_by is None
    assert same_bits(resumed.state, straight[1].state)
    assert figures(tmp_path / "run") == figures(straight[0])
    assert lines(tmp_path / "run", "eval") == lines(straight[0], "eval")


def test_ctrl_c_stops_after_the_step_and_old_handlers_return(tiny_run, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    signal_at(monkeypatch, 3, signal.SIGINT)
    stopped = train(tiny_run(), tmp_path / "run", console=quiet())
    assert (stopped.step, stopped.stopped_by) == (3, "SIGINT")
    assert saved_steps(tmp_path / "run") == [2, 3]
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_repeats_nothing(straight, finished, tiny_run, same_bits):
    again = train(tiny_run(), finished, resume=True, console=quiet())
    assert same_bits(again.state, straight[1].state)
    assert figures(finished) == figures(straight[0])
    assert [record["step"] for record in lines(finished, "eval")] == [4, STEPS]


def test_nan_raises_diverged_naming_a_finite_checkpoint(tiny_run, tmp_path, monkeypatch):
    nan_from(monkeypatch, 5)
    folder = tmp_path / "run"
    with pytest.raises(Diverged, match=r"loss is nan at step 5; last good checkpoint: .* step 4$"):
        train(tiny_run(), folder, console=quiet())
    assert saved_steps(folder) == [2, 4]
    with CheckpointStore(folder / CHECKPOINTS) as store:
        assert store.read_meta()[0] == 4
    model, _ = load_run(folder)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


def test_nan_of_a_run_with_limited_room_names_that_too(tiny_run, tmp_path, monkeypatch):
    """Experts on other devices without room for a batch give NaN."""
    nan_from(monkeypatch, 1)
    run = replace(tiny_run(), exchange=Exchange(room=1.5))
    with pytest.raises(Diverged, match=r"step 1 \(a sign, too, of too little room: .*room=1\.5\)"):
        train(run, tmp_path / "run", console=quiet())


def test_nan_while_a_good_step_is_being_saved_does_not_lose_it(tiny_run, tmp_path, monkeypatch):
    diverged, fetch, wait = threading.Event(), Snapshot.fetch, CheckpointStore.wait

    def fetch_late(self):
        assert diverged.wait(60)
        return fetch(self)

    def wait_late(self):
        if self._saving:
            diverged.set()
        wait(self)

    monkeypatch.setattr(Snapshot, "fetch", fetch_late)
    monkeypatch.setattr(CheckpointStore, "wait", wait_late)
    nan_from(monkeypatch, 5)
    run, folder = tiny_run(train={"save_every": 4}), tmp_path / "run"
    with pytest.raises(Diverged, match=r"nan at step 5; last good checkpoint: .* step 4$"):
        train(run, folder, console=quiet())
    model, _ = load_run(folder, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


def test_nan_before_any_checkpoint_is_said(tiny_run, tmp_path, monkeypatch):
    nan_from(monkeypatch, 1)
    with pytest.raises(Diverged, match=r"at step 1; last good checkpoint: none"):
        train(tiny_run(), tmp_path / "run", console=quiet())
    assert saved_steps(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e15, 1e30])
def test_checkpoints_of_a_run_that_blows_up_are_finite(tiny_run, tmp_path, rate):
    run = tiny_run(optimizer={"peak_lr": rate}, train={"save_every": 1, "keep": STEPS})
    with pytest.raises(Diverged, match="last good checkpoint"):
        train(run, tmp_path / "run", console=quiet())
    for step in saved_steps(tmp_path / "run"):
        model, _ = load_run(tmp_path / "run", step)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)), step


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"train": {"seed": 1}}, r"train\.seed: 0 -> 1"),
        ({"train": {"steps": 9}}, r"train\.steps: 8 -> 9"),
        ({"data": {"seq_len": 16}}, r"data\.seq_len: 32 -> 16"),
        ({"model": {"dim": 48}}, r"model\.dim: 32 -> 48"),
        ({"model": {"layers": 3}}, r"model\.layers: 2 -> 3"),
        ({"optimizer": {"moment_dtype": "bfloat16"}}, r"optimizer\.moment_dtype"),
    ],
)
def test_resuming_with_another_setting_names_it(finished, tiny_run, change, setting):
    with pytest.raises(ValueError, match=setting):
        train(tiny_run(**change), finished, resume=True, console=quiet())
    assert saved_steps(finished) == [4, 6, 8]


def test_settings_that_change_no_number_may_change_on_resume(finished, tiny_run):
    run = replace(tiny_run(train={"save_every": 3, "eval_every": 5, "keep": 2}), name="other")
    assert train(run, finished, resume=True, console=quiet()).step == STEPS


def test_resuming_on_another_text_is_refused(finished, tiny_run, another_text):
    path = Path(tiny_run().data.paths[0])
    original = path.read_bytes()
    try:
        another_text(path)
        with pytest.raises(ValueError, match="corpus has changed"):
            train(tiny_run(), finished, resume=True, console=quiet())
    finally:
        path.write_bytes(original)


def test_a_folder_that_holds_a_run_is_not_overwritten(finished, tiny_run):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        train(tiny_run(), finished, console=quiet())
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_of_nothing_starts_afresh(tiny_run, tmp_path, straight, monkeypatch):
    signal_at(monkeypatch, 1, signal.SIGTERM)
    outcome = train(tiny_run(), tmp_path / "new", resume=True, console=quiet())
    assert figures(tmp_path / "new") == figures(straight[0])[: outcome.step]


def test_damaged_newest_checkpoint_is_passed_over_and_named(
    straight, finished, tiny_run, same_bits
):
    damage(finished, STEPS)
    console = quiet()
    outcome = train(tiny_run(), finished, resume=True, console=console)
    assert f"checkpoint {STEPS} is damaged" in said(console)
    assert "resuming after step 6" in said(console)
    assert same_bits(outcome.state, straight[1].state)
    assert figures(finished) == figures(straight[0])
    load_run(finished, STEPS)


def test_no_good_checkpoint_left_is_an_error(finished, tiny_run):
    for step in saved_steps(finished):
        damage(finished, step)
    with pytest.raises(ValueError, match="no good checkpoint"):
        train(tiny_run(), finished, resume=True, console=quiet())


def test_metrics_line_cut_short_by_a_kill_is_dropped_on_resume(straight, finished, tiny_run):
    shutil.rmtree(finished / CHECKPOINTS / f"{STEPS:08d}")
    path = finished / "metrics.jsonl"
    text = path.read_text().splitlines()
    at = next(i for i, line in enumerate(text) if '"step": 7' in line)
    path.write_text("\n".join([*text[:at], text[at][:20]]))
    train(tiny_run(), finished, resume=True, console=quiet())
    assert figures(finished) == figures(straight[0])


def test_batch_ramps_up_in_whole_micro_batches(tiny_run, tmp_path, monkeypatch):
    run = tiny_run(train={"micro_batches": 4, "ramp_from": 2, "ramp_fraction": 0.5})
    seen = []

    def build_recorder(*_: object) -> Callable:
        def record(state, micro_batches, count):
            assert micro_batches.shape == (4, 2, 33)
            seen.append((int(count), np.asarray(micro_batches)[: int(count)].reshape(-1, 33)))
            zeros = dict.fromkeys(LOSSES, jnp.zeros(())) | {"max_vio_layers": jnp.zeros(3)}
            return state._replace(step=state.step + 1), zeros

        return record

    monkeypatch.setattr(runtime, "build_step", build_recorder)
    outcome = train(run, tmp_path / "run", console=quiet())
    assert [count for count, _ in seen] == [batch_size(run.train, n) // 2 for n in range(STEPS)]
    assert [count for count, _ in seen][:1] + [count for count, _ in seen][-1:] == [1, 4]
    stream = TrainStream(outcome.corpus.train, 32, run.train, run.train.seed)
    for n, (_, rows) in enumerate(seen):
        np.testing.assert_array_equal(rows, stream.batch(n))
    tokens = [record["tokens"] for record in lines(tmp_path / "run")]
    assert tokens == [32 * len(rows) for _, rows in seen]


def test_load_run_gives_the_model_of_the_final_state(straight, tiny_run):
    folder, outcome, _ = straight
    model, tokenizer = load_run(folder)
    tokens = jnp.asarray([tokenizer.encode("to be or not")])
    expected = model_of(tiny_run(), outcome.state.params, outcome.state.bias)
    np.testing.assert_array_equal(model(tokens), expected(tokens))
    earlier, _ = load_run(folder, 4)
    assert not np.array_equal(earlier.embed[...], model.embed[...])


def test_load_run_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        load_run(tmp_path)


def test_bits_per_byte_are_the_nats_of_the_text_over_its_bytes(straight):
    _, outcome, _ = straight
    held_out, result = outcome.corpus.held_out, outcome.evaluation
    nats = result.loss * (len(held_out.tokens) - 1)
    assert result.bits_per_byte == pytest.approx(nats / np.log(2) / held_out.text_bytes)
    routed = np.array(result.load)
    assert routed.shape == (2, 4)
    relative = routed.max(axis=1) / routed.mean(axis=1) - 1
    assert result.max_vio_layers == pytest.approx(relative.tolist(), abs=1e-5)
    assert result.max_vio_global == pytest.approx(relative.mean(), abs=1e-5)


def test_xz_is_measured_in_bits_per_byte(tiny_run):
    assert 0.1 < xz_bits_per_byte(tiny_run()) < 8
