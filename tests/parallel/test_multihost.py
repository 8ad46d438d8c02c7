"""Two real processes on this machine, four CPU devices each: losses, files, signals, errors."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dsjax.checkpoint.folders import committed
from dsjax.checkpoint.manifest import verify_manifest
from dsjax.config import Mesh, Run
from dsjax.train import CHECKPOINTS, train
from dsjax.train.metrics import JSONL, read_lines
from tests.train.conftest import make_run, quick_compilation, write_text

__all__ = ["quick_compilation"]

ROOT = Path(__file__).parents[2]
LONGEST_S = 300
STEPS = 8
pytestmark = pytest.mark.slow

RECIPE = """
from pathlib import Path
from dsjax.config import Mesh
from tests.train.conftest import make_run

def recipe():
    mesh = Mesh(fsdp=1, host=2, expert=4)
    return make_run(Path({corpus!r}), model={{"experts": 8}}, mesh=mesh)
"""

BROKEN = """
import os, run
from dsjax.train.runtime import Runtime
take, calls = Runtime.step, []

def take_or_fail(self, state, batch):
    calls.append(1)
    if os.environ["DSJAX_PROCESS"] == "1" and len(calls) == 4:
        raise OSError("the second disk is gone")
    return take(self, state, batch)

Runtime.step = take_or_fail
raise SystemExit(run.main({arguments}))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Pair:
    """Two processes on this machine, four CPU devices each; they write to OUT.0.log, OUT.1.log."""

    def __init__(self, out: Path, command: list[str], *own: list[str]):
        address = f"127.0.0.1:{free_port()}"
        self.out = out
        self.processes = [
            self._start(i, [*command, *arguments], address)
            for i, arguments in enumerate(own or ([], []))
        ]

    def _start(self, index: int, command: list[str], address: str) -> subprocess.Popen:
        mine = {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONUNBUFFERED": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT),
            "DSJAX_COORDINATOR": address, "JAX_COORDINATOR_BIND_ADDRESS": address,
            "DSJAX_PROCESSES": "2", "DSJAX_PROCESS": str(index), "DSJAX_START_TIMEOUT": "60",
        }  # fmt: skip
        with self.log(index).open("w") as file:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=clean_environment() | mine,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def log(self, index: int) -> Path:
        return self.out.with_suffix(f".{index}.log")

    def text(self, index: int) -> str:
        lines = self.log(index).read_text().splitlines()
        return "\n".join(line for line in lines if "peer ranks" not in line)

    def exit_codes(self) -> list[int]:
        return [process.wait(timeout=LONGEST_S) for process in self.processes]


def clean_environment() -> dict[str, str]:
    """Ours without what could lead processes elsewhere."""
    other = re.compile("XLA_FLAGS|SLURM_|DSJAX_|JAX_COORD|JOB_|KUBERNETES_|.*_proxy$", re.I)
    return {name: value for name, value in os.environ.items() if not other.match(name)}


@contextmanager
def pair(out: Path, command: list, *own: list) -> Generator[Pair]:
    """Two processes, of which none is left at the end."""
    both = Pair(out, [str(part) for part in command], *own)
    try:
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.wait()


def train_command(recipe: Path, out: Path) -> list:
    return ["run.py", "train", recipe, "--out", out, "--sample", "0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus") / "words.txt")


@pytest.fixture(scope="module")
def recipe(corpus) -> Path:
    path = corpus.with_name("recipe.py")
    path.write_text(RECIPE.format(corpus=str(corpus)))
    return path


@pytest.fixture(scope="module")
def run(corpus) -> Run:
    mesh = Mesh(fsdp=1, host=2, expert=4)
    return make_run(corpus, model={"experts": 8}, mesh=mesh)


@pytest.fixture(scope="module")
def together(recipe, tmp_path_factory) -> Pair:
    """A run of all steps on two processes; read it only."""
    out = tmp_path_factory.mktemp("together") / "run"
    with pair(out, train_command(recipe, out)) as both:
        assert both.exit_codes() == [0, 0], both.text(0) + both.text(1)
    return both


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> Path:
    """The same run on the same mesh, all of it in this process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(run, out, console=Console(quiet=True))
    return out


def figures(out: Path, kind: str = "train") -> list[list[float]]:
    names = ("loss", "mtp_loss", "grad_norm", "max_vio") if kind == "train" else ("loss",)
    records = [record for record in read_lines(out / JSONL) if record["kind"] == kind]
    return [[record["step"], *(record[name] for name in names)] for record in records]


def newest(out: Path) -> int:
    folder = out / CHECKPOINTS
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def assert_sealed(out: Path, steps: list[int]) -> None:
    """These checkpoints, whole, and nothing beside them."""
    folder = out / CHECKPOINTS
    assert sorted(path.name for path in folder.iterdir()) == [f"{step:08d}" for step in steps]
    for step in steps:
        assert verify_manifest(committed(folder, step)) == []


def test_two_processes_have_the_losses_of_one(together, alone):
    for kind in ("train", "eval"):
        np.testing.assert_allclose(figures(together.out, kind), figures(alone, kind), rtol=1e-5)
    assert [row[0] for row in figures(together.out)] == list(range(1, STEPS + 1))
    assert figures(together.out)[-1][1] < figures(together.out)[0][1]


def test_only_the_first_process_speaks_and_writes(together):
    first, second = together.text(0), together.text(1)
    assert "process 0 of 2, coordinator 127.0.0.1" in first
    assert f"step {STEPS}/{STEPS}" in first
    assert "bits per byte" in first
    assert re.fullmatch(r"process 1 of 2, coordinator .*DSJAX_PROCESS=1\)", second)
    assert len(list((together.out / "tensorboard").iterdir())) == 1
    assert not list(together.out.glob(".shared-*"))
    for line in (together.out / JSONL).read_text().splitlines():
        assert "stop_signal" not in json.loads(line)


def test_checkpoint_of_two_processes_is_resumed_by_one(together, alone, run, tmp_path):
    assert_sealed(together.out, [4, 6, 8])
    out = Path(shutil.copytree(together.out, tmp_path / "run"))
    shutil.rmtree(out / CHECKPOINTS / "00000008")
    assert train(run, out, resume=True, console=Console(quiet=True)).step == STEPS
    np.testing.assert_allclose(figures(out), figures(alone), rtol=1e-5)
    assert_sealed(out, [4, 6, 8])


def test_signal_to_the_second_stops_both_with_a_checkpoint(recipe, tmp_path):
    out = tmp_path / "run"
    command = [*train_command(recipe, out), "--train.steps", "2000", "--train.save-every", "5"]
    with pair(out, command) as both:
        limit = time.monotonic() + LONGEST_S
        while not newest(out) and time.monotonic() < limit:
            time.sleep(0.1)
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.exit_codes() == [0, 0], both.text(0) + both.text(1)
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", both.text(0))
    assert stopped, both.text(0)
    assert newest(out) == int(stopped[1]) < 2000
    assert verify_manifest(committed(out / CHECKPOINTS, newest(out))) == []
    assert figures(out)[-1][0] == newest(out)


def test_different_settings_are_refused_by_both(recipe, tmp_path):
    out = tmp_path / "run"
    with pair(out, train_command(recipe, out), [], ["--train.steps", "9"]) as both:
        assert both.exit_codes() == [2, 2], both.text(0) + both.text(1)
    for index in (0, 1):
        assert "processes [1] have other settings than process 0" in both.text(index)


def test_folders_that_are_not_shared_are_refused_by_both(recipe, tmp_path):
    command = ["run.py", "train", recipe]
    own = [["--out", str(tmp_path / name)] for name in ("here", "there")]
    with pair(tmp_path / "run", command, *own) as both:
        assert both.exit_codes() == [2, 2], both.text(0) + both.text(1)
    for index in (0, 1):
        assert "processes [1] do not see what process 0 writes" in both.text(index)


def test_error_of_one_process_ends_both(recipe, tmp_path):
    """In the middle of a run, with the other one in its step."""
    out = tmp_path / "run"
    code = BROKEN.format(arguments=[str(part) for part in train_command(recipe, out)[1:]])
    with pair(out, ["-c", code]) as both:
        codes = both.exit_codes()
    assert all(codes), both.text(0) + both.text(1)
    assert "the second disk is gone" in both.text(1)


def test_first_process_that_waits_in_vain_says_so(tmp_path):
    code = "import os; os.environ['DSJAX_START_TIMEOUT'] = '2'\n"
    code += "from dsjax.parallel.multihost import start\nif os.environ['DSJAX_PROCESS'] == '0':\n"
    code += "    start()"
    with pair(tmp_path / "run", ["-c", code]) as both:
        assert both.exit_codes() == [1, 0]
    assert "process 0 of 2" in both.text(0)
    assert "not all processes came within 2 s" in both.text(0)
    assert "Check failure" not in both.text(0)
