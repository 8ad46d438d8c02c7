"""A copy on the devices: its bits, its memory, and whether there is room for it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoint import snapshot
from dsjax.checkpoint.snapshot import Snapshot, has_room
from tests.checkpoint.conftest import random_bits

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int32", "uint8", "bool")
GIB = 1 << 30


def small_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(snapshot, "PIECE_BYTES", size)


def leaf_of(dtype: str, shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.ones(shape, bool) if dtype == "bool" else random_bits(seed, shape, dtype)


def assert_same_bits(host: dict[str, np.ndarray], leaves: dict[str, np.ndarray]) -> None:
    assert host.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert (host[name].shape, host[name].dtype) == (leaf.shape, leaf.dtype), name
        assert host[name].tobytes() == np.asarray(leaf).tobytes(), name


@pytest.mark.parametrize("size", [1, 12, 1 << 20])
def test_pieces_of_any_size_and_dtype_keep_all_bits(monkeypatch, size):
    small_pieces(monkeypatch, size)
    shapes = ((), (7,), (3, 5))
    leaves = {f"{d}{s}": leaf_of(d, s, seed) for seed, d in enumerate(DTYPES) for s in shapes}
    assert_same_bits(Snapshot(leaves).fetch(), leaves)


@pytest.mark.parametrize("set_mesh", [False, True])
def test_divided_and_replicated_arrays_come_back_whole(monkeypatch, set_mesh):
    small_pieces(monkeypatch, 64)
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    specs = (jax.P("data", "model"), jax.P(None, "data"), jax.P("model"), jax.P())
    x = np.arange(16 * 8, dtype=np.float32).reshape(16, 8)
    leaves = {str(spec): jax.device_put(x, jax.NamedSharding(mesh, spec)) for spec in specs}
    if set_mesh:
        with jax.set_mesh(mesh):
            copy = Snapshot(leaves)
    else:
        copy = Snapshot(leaves)
    assert_same_bits(copy.fetch(), {name: x for name in leaves})


def test_every_buffer_is_a_new_one(monkeypatch):
    small_pieces(monkeypatch, 256)
    leaves = {"whole": jnp.ones(8), "cut": jnp.ones((16, 16)), "flat": jnp.float32(3)}
    pieces = snapshot._in_pieces(leaves, snapshot.PIECE_BYTES)
    assert [len(pieces[name]) for name in leaves] == [1, 4, 1]
    own = {leaf.unsafe_buffer_pointer() for leaf in leaves.values()}
    copied = [piece.unsafe_buffer_pointer() for part in pieces.values() for piece in part]
    assert len(set(copied)) == 6
    assert own.isdisjoint(copied)


def test_steps_that_give_up_the_memory_do_not_change_it():
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 - 1, tree), donate_argnums=0)
    state = {"w": jax.random.uniform(jax.random.key(0), (512, 512)), "n": jnp.float32(2)}
    before = jax.tree.map(lambda x: np.array(x, copy=True), state)
    for _ in range(3):
        copy = Snapshot(state)
        for _ in range(3):
            state = step(state)
        assert_same_bits(copy.fetch(), before)
        before = jax.tree.map(lambda x: np.array(x, copy=True), state)


def test_memory_is_given_back_piece_by_piece(monkeypatch):
    small_pieces(monkeypatch, 4 * 1021)

    def alive() -> int:
        return sum(array.shape == (1021,) for array in jax.live_arrays())

    copy = Snapshot({"w": jnp.ones((16, 1021))})
    assert alive() == 16
    pieces = copy._fetch_pieces()
    for fetched in range(1, 17):
        next(pieces)
        assert alive() <= 16 - fetched + 3  # those in hand and on their way count twice
    assert next(pieces, None) is None
    assert alive() == 0


class Device:
    """One that says this of its memory."""

    def __init__(self, stats: dict[str, int] | None) -> None:
        self.memory_stats = lambda: stats


def leaf_on(*places: tuple[Device, int, int]) -> SimpleNamespace:
    shards = [
        SimpleNamespace(device=where, replica_id=replica, data=SimpleNamespace(nbytes=size))
        for where, replica, size in places
    ]
    return SimpleNamespace(addressable_shards=shards)


@pytest.mark.parametrize(
    ("limit", "peak", "sizes", "room"),
    [
        (100, 40, [50], True),
        (100, 40, [30, 20], True),
        (100, 40, [30, 30], False),
        (100, 45, [50], False),
        (100, 80, [50], False),
        (100, 101, [1], False),
    ],
)
def test_room_is_what_the_peak_leaves_and_a_tenth_more_than_the_state(limit, peak, sizes, room):
    card = Device({"bytes_limit": limit * GIB, "peak_bytes_in_use": peak * GIB})
    leaves = {str(n): leaf_on((card, 0, size * GIB)) for n, size in enumerate(sizes)}
    assert has_room(leaves) is room


def test_the_fullest_device_decides_and_replicas_count_once():
    roomy = Device({"bytes_limit": 100, "peak_bytes_in_use": 0})
    full = Device({"bytes_limit": 100, "peak_bytes_in_use": 90})
    assert has_room({"replicated": leaf_on((roomy, 0, 60), (full, 1, 60))})
    assert not has_room({"divided": leaf_on((roomy, 0, 30), (full, 0, 30))})


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 1}])
def test_a_device_that_does_not_tell_holds_small_states_only(stats):
    card = Device(stats)
    assert has_room({"a": leaf_on((card, 0, GIB // 2))})
    assert not has_room({"a": leaf_on((card, 0, GIB // 2)), "b": leaf_on((card, 0, GIB // 2))})
