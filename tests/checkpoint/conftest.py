"""A small state, and a committed step to copy and damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import CheckpointStore, store


def random_bits(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Every bit pattern may occur: NaNs with payload, infinities, negative zeros."""
    width = jnp.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).bytes(int(np.prod(shape)) * width)
    return jnp.asarray(np.frombuffer(raw, jnp.dtype(dtype)).reshape(shape))


@pytest.fixture
def state() -> dict:
    return {
        "model": {"w": random_bits(0, (16, 8), "bfloat16"), "scale": random_bits(1, (), "float32")},
        "moments": [random_bits(2, (16, 8), "float32"), random_bits(3, (5,), "int32")],
        "key": random_bits(4, (2,), "uint32"),
        "step": jnp.int32(7),
    }


@pytest.fixture(params=[True, False], ids=["on_devices", "on_host"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves copy the state on the devices, or to the host for want of room."""
    monkeypatch.setattr(store, "has_room", lambda _: request.param)


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the single step 3; read it only."""
    folder = tmp_path_factory.mktemp("committed")
    with CheckpointStore(folder) as store:
        store.save(3, {"w": random_bits(0, (64, 8), "float32"), "n": jnp.int32(3)}, {"note": "x"})
    return folder


@pytest.fixture
def fresh(committed: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Make a copy of the committed store."""
    return lambda number: Path(shutil.copytree(committed, tmp_path / f"copy{number}"))
