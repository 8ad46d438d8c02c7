"""A tiny run on a small corpus, on one device, whose step is compiled once."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Balance, Data, Mtp, Optimizer, Run, Train
from dsjax.parallel import build_mesh
from dsjax.train import runtime
from dsjax.train.step import TrainState, initial_state
from tests.tiny import CONFIG

MODEL = replace(
    CONFIG, vocab_size=300, layers=2, dense_layers=0, experts=4, groups=1, top_groups=1,
    init_std=0.1, mtp_depth=1,
)  # fmt: skip


def write_text(path: Path, seed: int = 0) -> Path:
    """About four kilobytes of words."""
    words = np.random.default_rng(seed).choice(["to", "be", "or", "not", "that", "is"], 1200)
    path.write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, len(words), 12)))
    return path


def make_run(corpus: Path, **sections: object) -> Run:
    """Eight steps of the tiny model; keyword arguments replace sections or their fields."""
    run = Run(
        name="tiny",
        precision="fp32",
        model=MODEL,
        data=Data(paths=(str(corpus),), seq_len=32, held_out=0.2),
        train=Train(steps=8, batch=8, save_every=2, eval_every=4),
        optimizer=Optimizer(peak_lr=1e-2),
        balance=Balance(bias_speed=1e-2),
        mtp=Mtp(),
    )
    changed = {
        name: replace(getattr(run, name), **change) if isinstance(change, dict) else change
        for name, change in sections.items()
    }
    return replace(run, **changed)


def draw_state(run: Run, seed: int = 2) -> TrainState:
    """A state before the first step, drawn by numpy: random generators are slow to compile."""
    shapes = jax.eval_shape(lambda: initial_state(run))
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if "norm" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, leaf.dtype)
        return (0.1 * generator.standard_normal(leaf.shape)).astype(leaf.dtype)

    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return zeros._replace(params=jax.tree_util.tree_map_with_path(draw, shapes.params))


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    """Programs that run for milliseconds are not worth optimising."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file; read it only."""
    return write_text(tmp_path_factory.mktemp("corpus") / "words.txt")


@pytest.fixture(scope="session")
def tiny_run(corpus: Path) -> Callable[..., Run]:
    return functools.partial(make_run, corpus)


@pytest.fixture(scope="session")
def another_text() -> Callable[[Path], Path]:
    """Writes a corpus of other words than the session's."""
    return functools.partial(write_text, seed=1)


@pytest.fixture
def on_one_device(monkeypatch: pytest.MonkeyPatch, step_cache: SimpleNamespace) -> None:
    """Runs use the first device only, and equal runs share their compiled step."""
    monkeypatch.setattr(runtime, "build_mesh", functools.partial(build_mesh, devices=1))
    monkeypatch.setattr(runtime, "build_step", step_cache.build)


@pytest.fixture(scope="session")
def step_cache() -> SimpleNamespace:
    return SimpleNamespace(build=shared_steps())


def shared_steps() -> Callable:
    """`build_step` that returns the same compiled step for runs that differ in name only."""
    build = functools.cache(runtime.build_step)
    return lambda run, placement: build(replace(run, name="any"), placement)


@pytest.fixture(scope="session")
def fresh_state(tiny_run: Callable[..., Run]) -> Callable[[], TrainState]:
    """Makes the tiny run's state before a step, to be consumed by it."""
    drawn = draw_state(tiny_run())
    return lambda: jax.tree.map(jnp.array, drawn)


@pytest.fixture(scope="session")
def same_bits() -> Callable[[object, object], bool]:
    """Whether two trees hold the same arrays, bit for bit."""

    def same(a: object, b: object) -> bool:
        left, right = jax.tree.leaves(a), jax.tree.leaves(b)
        return jax.tree.structure(a) == jax.tree.structure(b) and all(
            x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
            for x, y in zip(left, right, strict=True)
        )

    return same
