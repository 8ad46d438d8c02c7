"""Step times do not depend on when the host looks; finished records are never repeated."""

import json
from contextlib import suppress

import jax.numpy as jnp
import pytest

from dsjax.train import metrics
from dsjax.train.metrics import Diverged, MetricsLog, Pending, read_lines

FINITE = {name: jnp.float32(1.0) for name in ("loss", "mtp_loss", "grad_norm")}


@pytest.fixture
def clock(monkeypatch):
    """Sets what the time is at each look."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def times(clock, looks, tokens=100):
    pending, found = Pending(), []
    for step, look in enumerate(looks, start=1):
        clock[0] = look
        pending.add(step, tokens, FINITE)
        found += [values for _, values in pending.ready(behind=0)]
    return found


def test_a_late_look_does_not_make_the_next_step_instant(clock):
    looks = [30.0, *(30.0 + step for step in range(1, 9)), 39.999, 40.0]
    last = times(clock, looks)[-1]
    assert last["step_seconds"] == pytest.approx(1.0)
    assert last["tokens_per_second"] == pytest.approx(100.0)


def test_compilation_counts_for_the_first_step_alone(clock):
    first, second = times(clock, [30.0, 31.0])
    assert first["step_seconds"] == 30.0
    assert second["step_seconds"] == 1.0


def test_time_before_a_restart_is_left_out(clock):
    pending = Pending()
    for step, look in ((1, 5.0), (2, 6.0)):
        clock[0] = look
        pending.add(step, 100, FINITE)
        list(pending.ready(behind=0))
    clock[0] = 50.0
    pending.restart_clock()
    clock[0] = 52.0
    pending.add(3, 100, FINITE)
    assert next(pending.ready(behind=0))[1]["step_seconds"] == 2.0


def step_at(clock, pending, number, look, tokens=100):
    clock[0] = look
    pending.add(number, tokens, FINITE)
    return next(pending.ready(behind=0))[1]


def stay(clock, pending, what, seconds):
    with pending.apart(what):
        clock[0] += seconds


def test_goodput_is_what_saving_leaves_of_the_time_of_training(clock):
    pending = Pending()
    first = step_at(clock, pending, 1, 30.0)
    assert (first["goodput"], first["save_seconds"], first["eval_seconds"]) == (1.0, 0.0, 0.0)
    assert pending.goodput.tokens_per_second is None
    assert step_at(clock, pending, 2, 34.0)["goodput"] == 1.0
    stay(clock, pending, "save", 1.0)
    stay(clock, pending, "eval", 90.0)
    third = step_at(clock, pending, 3, 130.0)  # 100 s after the first step, 10 of them training
    assert third["goodput"] == pytest.approx(1 - 1 / 10)
    assert (third["save_seconds"], third["eval_seconds"]) == (1.0, 90.0)
    assert third["step_seconds"] == pytest.approx(5.0)
    assert pending.goodput.tokens_per_second == pytest.approx(200 / 10)
    assert step_at(clock, pending, 4, 140.0)["goodput"] == pytest.approx(1 - 1 / 20)
    assert pending.goodput.share == pytest.approx(0.95)


def test_a_save_after_the_last_step_leaves_the_goodput_alone(clock):
    pending = Pending()
    for number in (1, 2):
        step_at(clock, pending, number, float(number))
    stay(clock, pending, "save", 1000.0)
    assert pending.goodput.share == 1.0


def test_a_save_that_fails_is_counted_too(clock):
    pending = Pending()
    step_at(clock, pending, 1, 1.0)
    clock[0] = 3.0
    with suppress(OSError), pending.apart("save"):
        clock[0] = 5.0
        raise OSError
    assert step_at(clock, pending, 2, 9.0)["goodput"] == pytest.approx(1 - 2 / 8)


def test_a_value_that_is_not_finite_stops_after_its_record():
    pending = Pending()
    pending.add(7, 100, FINITE | {"grad_norm": jnp.float32(jnp.nan)})
    ready = pending.ready(behind=0)
    assert next(ready)[0] == 7
    with pytest.raises(Diverged, match="grad_norm is nan at step 7"):
        next(ready)


def test_resuming_drops_later_lines_and_one_cut_short(tmp_path):
    path = tmp_path / metrics.JSONL
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"kind": "tr')
    log = MetricsLog(tmp_path, start=2)
    log.write("train", 2, {"loss": 9.0})
    log.write("train", 3, {"loss": 1.0})
    log.close()
    assert [(r["step"], r.get("loss")) for r in read_lines(path)] == [
        (1, None),
        (2, None),
        (3, 1.0),
    ]
