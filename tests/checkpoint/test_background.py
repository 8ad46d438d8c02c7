"""Saves that go on while training does: what they store, how they fail, where they run."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import CheckpointError, CheckpointStore, arrays, saving, snapshot, store
from dsjax.checkpoint.arrays import ArrayWriter
from dsjax.checkpoint.snapshot import Snapshot

LIMIT_S = 30

take_step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)


def fresh() -> dict:
    return {"w": jax.random.uniform(jax.random.key(0), (256, 256)), "n": jnp.float32(3)}


def bits(tree: dict) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in tree.items()}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Keeps every save from fetching its copy until it is set."""
    gate, fetch = threading.Event(), Snapshot.fetch

    def wait_and_fetch(self: Snapshot) -> dict:
        assert gate.wait(LIMIT_S)
        return fetch(self)

    monkeypatch.setattr(Snapshot, "fetch", wait_and_fetch)
    return gate


def failing(error: Exception) -> Callable:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_a_save_in_flight_stores_the_step_it_was_asked_for(tmp_path: Path, held) -> None:
    state, like = fresh(), fresh()
    with CheckpointStore(tmp_path) as kept:
        for _ in range(3):
            state = take_step(state)
        wanted = bits(state)
        kept.save(3, state, {})
        for _ in range(5):
            state = take_step(state)
        jax.block_until_ready(state)
        assert kept.steps() == []
        held.set()
        restored = kept.restore(like)
    assert (restored.step, bits(restored.state)) == (3, wanted)
    assert bits(state) != wanted


def test_the_next_save_waits_for_the_one_in_flight(tmp_path: Path, held) -> None:
    with CheckpointStore(tmp_path) as kept:
        kept.save(1, {"n": jnp.int32(1)}, {})
        threading.Timer(0.2, held.set).start()
        kept.save(2, {"n": jnp.int32(2)}, {})
        assert held.is_set()
        assert kept.steps()[:1] == [1]
        kept.wait()
        assert kept.steps() == [1, 2]


@pytest.mark.parametrize(("owner", "name"), [(Snapshot, "fetch"), (ArrayWriter, "start_from_host")])
@pytest.mark.parametrize("how", ["wait", "save", "close"])
def test_a_failure_in_the_background_surfaces_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, how: str
) -> None:
    kept = CheckpointStore(tmp_path)
    kept.save(1, {"n": jnp.int32(1)}, {})
    kept.wait()
    calls = {"wait": kept.wait, "close": kept.close, "save": lambda: kept.save(3, fresh(), {})}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(RuntimeError("lost the card")))
        kept.save(2, fresh(), {})
        with pytest.raises(CheckpointError, match=r"step 2 failed: lost the card; .* step is 1"):
            calls[how]()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    if how != "close":
        kept.save(2, {"n": jnp.int32(2)}, {})
        kept.close()
        assert kept.steps() == [1, 2]


def test_room_is_asked_for_once_before_the_first_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(store, "has_room", lambda leaves: asked.append(list(leaves)) or True)
    with CheckpointStore(tmp_path) as kept:
        for step in (1, 2, 3):
            kept.save(step, {"n": jnp.int32(step)}, {})
    assert asked == [["n"]]


def test_without_room_the_host_copies_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(saving, "Snapshot", failing(AssertionError("a copy on the device")))
    monkeypatch.setattr(store, "has_room", lambda _: False)
    state = fresh()
    with CheckpointStore(tmp_path) as kept:
        kept.save(1, state, {})
        wanted = bits(state)
        jax.block_until_ready(take_step(state))
        assert bits(kept.restore(fresh()).state) == wanted
    assert "saving waits until 0.0 GiB are on the host" in caplog.text


def test_several_processes_copy_to_the_host(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(store.hosts, "is_alone", lambda: False)
    monkeypatch.setattr(store.hosts, "any_true", lambda flag: flag)
    monkeypatch.setattr(store.hosts, "share", lambda number: number)
    monkeypatch.setattr(saving, "Snapshot", failing(AssertionError("a copy on the device")))
    with CheckpointStore(tmp_path) as kept:
        kept.save(1, fresh(), {})
        kept.wait()
        assert kept.steps() == [1]
    assert caplog.text == ""


def test_a_device_that_runs_out_after_all_makes_the_host_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    monkeypatch.setattr(snapshot, "_in_pieces", failing(error))
    state = fresh()
    with CheckpointStore(tmp_path) as kept:
        kept.save(1, state, {})
        assert "RESOURCE_EXHAUSTED" in caplog.text
        assert bits(kept.restore(fresh()).state) == bits(state)


def test_orbax_runs_in_the_thread_of_the_save_even_beside_an_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, start = [], ArrayWriter.start_from_host

    def note_and_start(self: ArrayWriter, *args: object) -> None:
        threads.append(threading.current_thread().name)
        start(self, *args)

    monkeypatch.setattr(ArrayWriter, "start_from_host", note_and_start)

    async def train() -> None:
        with CheckpointStore(tmp_path) as kept:
            for step in (1, 2):
                kept.save(step, {"n": jnp.int32(step)}, {})

    asyncio.run(train())
    assert threads == ["dsjax-checkpoint"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"00000001", "00000002"}


def test_big_arrays_are_stored_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1 << 10)
    state = fresh() | {"bf16": jnp.arange(6 * 7 * 300, dtype=jnp.bfloat16).reshape(6, 7, 300)}
    with CheckpointStore(tmp_path) as kept:
        kept.save(1, state, {})
        assert bits(kept.restore(state).state) == bits(state)
