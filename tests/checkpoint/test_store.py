"""Saving, restoring, pruning, damage, failing disks."""

import errno
import logging
import random
import resource
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import CheckpointError, CheckpointStore
from dsjax.checkpoint.manifest import verify_manifest


def _abstract(tree: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _same_bits(left: dict, right: dict) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and np.array(a).tobytes() == np.array(b).tobytes()
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def _small(value: int) -> dict:
    return {"n": jnp.int32(value)}


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def _a_file(step_folder: Path) -> Path:
    return max((step_folder / "state" / "d").iterdir())


def _unsaved(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.isdigit()]


@pytest.mark.usefixtures("both_ways")
def test_round_trip_is_bit_exact(tmp_path: Path, state: dict) -> None:
    meta = {"stream": {"offset": 12, "files": ["a", "b"]}, "loss": 0.1, "none": None}
    with CheckpointStore(tmp_path) as store:
        store.save(7, state, meta)
        restored = store.restore(_abstract(state))
        by_arrays = store.restore(state, step=7)
        assert store.read_meta() == (7, meta)
    assert (restored.step, restored.meta, restored.skipped) == (7, meta, {})
    assert _same_bits(restored.state, state)
    assert _same_bits(by_arrays.state, state)


@pytest.mark.usefixtures("both_ways")
def test_a_save_does_not_see_what_happens_after_it(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    x = jax.random.uniform(jax.random.key(0), (1024, 1024))
    before, like, meta = np.array(x, copy=True), _abstract({"x": x}), {"list": [1]}
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": x}, meta)
        meta["list"].append(2)
        jax.block_until_ready(overwrite(overwrite(x)))
        restored = store.restore(like)
    np.testing.assert_array_equal(restored.state["x"], before)
    assert restored.meta == {"list": [1]}


def test_the_newest_are_kept(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (1, 2, 30, 4):
            store.save(step, _small(step), {})
        store.wait()
        assert store.steps() == [4, 30]
        assert _unsaved(tmp_path) == []


def test_pruning_spares_the_only_good_step(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in (20, 30):
            store.save(step, _small(step), {})
            store.wait()
            _flip(_a_file(tmp_path / f"{step:08d}"), 5)
        store.save(10, _small(10), {})
        assert store.restore(_small(0)).step == 10


def test_a_damaged_step_is_named_and_the_older_one_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, _small(1), {"at": 1})
        store.save(2, _small(2), {"at": 2})
        store.wait()
        harmed = _a_file(tmp_path / "00000002")
        _flip(harmed, 0)
        with caplog.at_level(logging.WARNING, "dsjax.checkpoint"):
            restored = store.restore(_small(0))
        assert (restored.step, int(restored.state["n"]), restored.meta) == (1, 1, {"at": 1})
        assert list(restored.skipped) == [2]
        assert harmed.name in restored.skipped[2][0]
        assert "step 2 is damaged" in caplog.text
        assert store.read_meta() == (1, {"at": 1})
        with pytest.raises(CheckpointError, match=f"step 2: .*{harmed.name} has changed"):
            store.restore(_small(0), step=2)
        _flip(_a_file(tmp_path / "00000001"), 0)
        with pytest.raises(CheckpointError, match=r"step 2: .* step 1: "):
            store.restore(_small(0))


def test_saving_a_step_again(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        store.save(1, _small(1), {})
        store.save(1, _small(99), {})
        assert int(store.restore(_small(0)).state["n"]) == 1
        (tmp_path / "00000001" / "meta.json").unlink()
        store.save(1, _small(99), {})
        assert int(store.restore(_small(0)).state["n"]) == 99
        assert store.steps() == [1]


def test_no_damage_is_restored_silently(fresh: Callable[[int], Path]) -> None:
    dice = random.Random(0)
    for number in range(100):
        folder = fresh(number)
        files = sorted(path for path in (folder / "00000003").rglob("*") if path.is_file())
        path = dice.choice(files)
        place = dice.randrange(path.stat().st_size)
        if number % 3:
            _flip(path, place)
        else:
            path.write_bytes(path.read_bytes()[:place])
        problems = verify_manifest(folder / "00000003")
        assert any(path.name in problem for problem in problems), (number, path, place)
        with CheckpointStore(folder) as store, pytest.raises(CheckpointError, match=path.name):
            store.restore({"w": jnp.zeros((64, 8)), "n": jnp.int32(0)})


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("spec", [jax.P("data", "model"), jax.P(None, "data"), jax.P()])
def test_restores_onto_another_mesh(tmp_path: Path, spec: jax.P) -> None:
    x = jnp.arange(128, dtype=jnp.bfloat16).reshape(16, 8)
    source = jax.NamedSharding(jax.make_mesh((8,), ("all",)), jax.P("all"))
    target = jax.NamedSharding(jax.make_mesh((2, 4), ("data", "model")), spec)
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jax.device_put(x, source)}, {})
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)}
        restored = store.restore(like).state["x"]
    assert restored.sharding == target
    np.testing.assert_array_equal(np.array(restored), np.array(x))


def test_restores_what_eval_shape_describes(tmp_path: Path) -> None:
    def init() -> dict:
        return {"x": jax.reshard(jnp.ones((8, 2)), jax.P("all"))}

    with CheckpointStore(tmp_path) as store:
        with jax.set_mesh(jax.make_mesh((8,), ("all",))):
            state, like = jax.jit(init)(), jax.eval_shape(init)
            store.save(1, state, {})
            assert store.restore(like).state["x"].sharding == state["x"].sharding
        with pytest.raises(ValueError, match="restore under"):
            store.restore(like)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"a": [(2, 3), "float32"], "b": [(4,), "int32"]}, None),
        ({"a": [(2, 4), "float32"], "b": [(4,), "int32"]}, r"a is float32\[2,4\] .*32\[2,3\] in"),
        ({"a": [(2, 3), "bfloat16"], "b": [(4,), "int32"]}, r"a is bfloat16\[2,3\] .*float32\["),
        ({"a": [(2, 3), "float32"]}, r"b is absent here and int32\[4\] in"),
        (
            {"a": [(2, 3), "float32"], "b": [(4,), "int32"], "c": [(), "int32"]},
            r"c is int32\[\] here and absent in",
        ),
    ],
)
def test_another_architecture_names_the_leaf(tmp_path: Path, like: dict, words: str | None) -> None:
    wanted = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in like.items()}
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"a": jnp.ones((2, 3)), "b": jnp.arange(4)}, {})
        if words is None:
            store.restore(wanted)
            return
        with pytest.raises(CheckpointError, match=f"another architecture: {words}"):
            store.restore(wanted)


@pytest.mark.parametrize(
    ("state", "meta", "words"),
    [
        ({}, {}, "holds no arrays"),
        ({"a": {"b": np.ones(2)}}, {}, r"a\.b is a ndarray"),
        ({"a": jnp.ones((0, 2))}, {}, r"a has shape \(0, 2\)"),
        ({"a": jax.eval_shape(lambda: jnp.ones(2))}, {}, "a is a ShapeDtypeStruct"),
        ({"a": jnp.ones(2)}, {"x": {"y": [1, b""]}}, r"meta\.x\.y\[1\] is a bytes"),
        ({"a": jnp.ones(2)}, {"x": {1: 2}}, r"meta\.x has the key 1"),
    ],
)
def test_what_cannot_be_stored_is_named(
    tmp_path: Path, state: dict, meta: dict, words: str
) -> None:
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(ValueError, match=words):
            store.save(1, state, meta)
        assert list(tmp_path.iterdir()) == []


def test_key_arrays_are_refused(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match="key_data"):
        store.save(1, {"key": jax.random.key(0)}, {})


@pytest.mark.parametrize("step", [-1, 1.5, "1"])
def test_a_bad_step_is_refused(tmp_path: Path, step: int) -> None:
    with CheckpointStore(tmp_path) as store, pytest.raises(ValueError, match="step is"):
        store.save(step, _small(1), {})


def test_missing_steps_are_named(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointError, match="no checkpoint"):
            store.restore(_small(0))
        store.save(3, _small(3), {})
        with pytest.raises(CheckpointError, match=r"no step 4; its steps are \[3\]"):
            store.restore(_small(0), step=4)


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot write checkpoints to .*file"):
            CheckpointStore(folder)


def test_a_closed_store_refuses_to_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="is closed"):
        store.save(1, _small(1), {})


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    "place", ["saving.write_durably", "saving.write_manifest", "manifest.os.fsync"]
)
def test_a_full_disk_leaves_the_good_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = CheckpointStore(tmp_path)
    store.save(1, _small(1), {})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(f"dsjax.checkpoint.{place}", full)
        store.save(2, _small(2), {})
        with pytest.raises(CheckpointError, match=r"step 2 failed: .*No space.* good step is 1"):
            store.wait()
    assert _unsaved(tmp_path) == []
    assert store.restore(_small(0)).step == 1
    store.save(2, _small(2), {})
    store.wait()
    assert store.steps() == [1, 2]
    store.close()


@pytest.mark.usefixtures("both_ways")
def test_orbax_fails_to_write(tmp_path: Path) -> None:
    """The kernel refuses to let any file grow beyond 64 KiB, in the middle of a write."""
    big = {"x": jax.random.uniform(jax.random.key(0), (512, 512))}
    store = CheckpointStore(tmp_path)
    store.save(1, _small(1), {})
    store.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        store.save(2, big, {})
        with pytest.raises(CheckpointError, match=r"step 2 failed: .*good step is 1"):
            store.save(3, _small(3), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _unsaved(tmp_path) == []
    store.save(2, big, {})
    store.close()
    assert store.steps() == [1, 2]
