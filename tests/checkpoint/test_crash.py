"""kill -9 at any moment, and what a dead run leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

from dsjax.checkpoint import CheckpointStore
from dsjax.checkpoint.folders import make_locked

# Imports once and forks before any backend starts, so that a round costs no second import.
KILLED = """
import json, os, random, signal, sys, time
import jax, jax.numpy as jnp
from pathlib import Path
from dsjax.checkpoint import CheckpointStore
from dsjax.checkpoint.manifest import verify_manifest

folder, dice = Path(sys.argv[1]), random.Random(0)

def train(until, ready):
    with CheckpointStore(folder, keep=2) as store:
        like = {"n": jnp.int32(0), "w": jnp.zeros(64)}
        state, first = like, 0
        if store.steps():
            restored = store.restore(like)
            state, first = restored.state, restored.step
            assert not restored.skipped
            assert int(state["n"]) == first == restored.meta["n"]
            assert float(state["w"].sum()) == 64 * first
        os.write(ready, b"!")
        for step in range(first + 1, until):
            state = {"n": state["n"] + 1, "w": state["w"] + 1}
            store.save(step, state, {"n": step})

def round_(number):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            train(10**6 if number < 5 else newest() + 3, writer)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    if number < 5:
        time.sleep(dice.uniform(0.1, 0.6))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    names = sorted(path.name for path in folder.iterdir())
    whole = [name for name in names if name.isdigit()]
    problems = {name: verify_manifest(folder / name) for name in whole}
    print(json.dumps({"status": status, "names": names, "problems": problems}), flush=True)

def newest():
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0)

for number in range(6):
    round_(number)
"""

LEFT_OPEN = """
import sys
import jax.numpy as jnp
from dsjax.checkpoint import CheckpointStore
CheckpointStore(sys.argv[1]).save(1, {"x": jnp.ones((256, 256))}, {})
"""


def _run(script: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60
    )


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    done = _run(KILLED, tmp_path)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert [entry["status"] for entry in rounds] == [9] * 5 + [0], done.stderr
    newest = [int(max(entry["problems"], default="0")) for entry in rounds]
    assert newest == sorted(newest)
    assert newest[-1] == newest[-2] + 2
    assert newest[0] > 0
    for entry in rounds:
        assert not any(entry["problems"].values()), entry
    assert rounds[-1]["names"] == [f"{step:08d}" for step in (newest[-1] - 1, newest[-1])]


def test_leaving_without_close_neither_hangs_nor_harms(tmp_path: Path) -> None:
    _run(LEFT_OPEN, tmp_path)
    with CheckpointStore(tmp_path) as store:
        assert store.steps() in ([], [1])
        store.save(1, {"x": jnp.ones((256, 256))}, {})
        assert store.restore({"x": jnp.zeros((256, 256))}).step == 1


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path) -> None:
    for name in ("00000004.partial-1a", "00000005.trash-1a", "mine", "00000004.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004.partial", "mine"]


def test_a_reader_spares_the_partial_folder_of_a_live_run(tmp_path: Path) -> None:
    live = tmp_path / "00000004.partial-1a"
    make_locked(live)
    with CheckpointStore(tmp_path):
        assert live.exists()
