"""A run that is killed again and again ends like one that was left alone."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax.checkpoint import CheckpointStore
from dsjax.checkpoint.folders import committed
from dsjax.checkpoint.manifest import verify_manifest
from dsjax.train import CHECKPOINTS, initial_state
from dsjax.train.metrics import JSONL, read_lines
from tests.train.conftest import make_run, write_text

ROOT = Path(__file__).parents[1]
STEPS, KILLS, LONGEST_S = 120, 20, 60
RECIPE = """
from pathlib import Path
from tests.train.conftest import make_run

def recipe():
    train = {{"steps": {steps}, "save_every": 2, "eval_every": 50}}
    return make_run(Path({corpus!r}), train=train)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    corpus = write_text(folder / "words.txt")
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(steps=STEPS, corpus=str(corpus)))
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen:
    """The run in a process of its own, on one device; it writes to OUT.log."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "run.py", "train", recipe, "--out", out, "--resume", "--sample", "0"]
    with log(out).open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def log(out: Path) -> Path:
    return out.with_suffix(".log")


def text(out: Path) -> str:
    return re.sub(r"\s+", " ", log(out).read_text())


def wait_until_trained(process: subprocess.Popen, out: Path, after: int) -> None:
    """Return once a step after `after` is committed, or the process has ended."""
    limit = time.monotonic() + LONGEST_S
    while process.poll() is None and newest(out) <= after:
        assert time.monotonic() < limit, text(out)
        time.sleep(0.01)


def newest(out: Path) -> int:
    folder = out / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def finish(recipe: Path, out: Path) -> None:
    assert start(recipe, out).wait(timeout=120) == 0, text(out)


def final_state(out: Path) -> dict:
    like = jax.eval_shape(lambda: initial_state(make_run(Path("unread"), train={"steps": STEPS})))
    with CheckpointStore(out / CHECKPOINTS) as store:
        return store.restore(like._asdict(), STEPS).state


def figures(out: Path) -> list[tuple]:
    records = read_lines(out / JSONL)
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in records]


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(recipe, out)
    return out


def kill_once(recipe: Path, out: Path, dice: random.Random, early: bool) -> None:
    """Kill -9 during start-up, or within the first second after a new checkpoint."""
    before = newest(out)
    process = start(recipe, out)
    if early:
        time.sleep(dice.uniform(0.5, 6.0))
    else:
        wait_until_trained(process, out, before)
        time.sleep(dice.uniform(0.0, 0.4))
    process.kill()
    process.wait()
    assert process.returncode in (0, -signal.SIGKILL), text(out)
    for step in re.findall(r"resuming after step (\d+)", text(out)):
        assert int(step) == before
    assert "damaged" not in text(out)
    if newest(out):
        assert newest(out) >= before
        assert verify_manifest(committed(out / CHECKPOINTS, newest(out))) == []


def test_twenty_kills_change_nothing_in_the_end(recipe, undisturbed, tmp_path):
    out, dice = tmp_path / "run", random.Random(0)
    reached = []
    for number in range(KILLS):
        kill_once(recipe, out, dice, early=number % 4 == 3)
        reached.append(newest(out))
    print("newest step after each kill:", reached)
    assert reached == sorted(reached)
    assert 0 < reached[-1] < STEPS
    finish(recipe, out)
    assert f"resuming after step {reached[-1]}" in text(out)
    assert figures(out) == figures(undisturbed)
    left, right = map(jax.tree.leaves, (final_state(out), final_state(undisturbed)))
    for a, b in zip(left, right, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    leftovers = [path.name for path in (out / CHECKPOINTS).iterdir() if not path.name.isdigit()]
    assert leftovers == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_signal_saves_and_exits_with_success(recipe, tmp_path, number):
    out = tmp_path / "run"
    process = start(recipe, out)
    wait_until_trained(process, out, 0)
    process.send_signal(number)
    assert process.wait(timeout=LONGEST_S) == 0, text(out)
    stopped = re.search(rf"stopped by {number.name} after step (\d+)", text(out))
    assert stopped, text(out)
    assert int(stopped[1]) == newest(out) < STEPS
    assert verify_manifest(committed(out / CHECKPOINTS, newest(out))) == []
    assert [record[1] for record in figures(out) if record[0] == "train"][-1] == newest(out)
