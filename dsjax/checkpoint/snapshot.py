"""A copy of the state on its own devices, which the host fetches while training goes on.

The copy is cut into pieces: the runtime stages what is smaller than 1 GiB in pinned memory and
takes no Python lock meanwhile, whatever else is read waits for a piece at most, and each piece's
device memory is free again as soon as it has been fetched.
"""

import functools
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

PIECE_BYTES = 1 << 27
SMALL_BYTES = 1 << 30
"""What a device that does not tell its memory is trusted to hold once more."""
SPARE = 1.1
"""Free memory asked for, in sizes of the state: fragments and what later steps need more."""


def has_room(leaves: Mapping[str, jax.Array]) -> bool:
    """Whether each device can hold what it owns of `leaves` beside the most it held so far.

    To be asked before the first snapshot: from then on the peak includes it.
    """
    needed: Counter[jax.Device] = Counter()
    for leaf in leaves.values():
        for shard in _owned(leaf):
            needed[shard.device] += shard.data.nbytes
    return all(_fits(device.memory_stats() or {}, size) for device, size in needed.items())


def _fits(stats: dict[str, int], size: int) -> bool:
    if not {"bytes_limit", "peak_bytes_in_use"} <= stats.keys():
        return size < SMALL_BYTES
    return stats["bytes_limit"] - stats["peak_bytes_in_use"] > SPARE * size


@dataclass(frozen=True)
class _Shard:
    """Where the next `pieces` pieces belong: the part `index` of the leaf `name`."""

    name: str
    index: tuple[slice, ...]
    shape: tuple[int, ...]
    pieces: int


class Snapshot:
    """The arrays as they are now, even if the next step gives up their memory.

    Copying is dispatched and not awaited. Every device must be of this process. Raises
    JaxRuntimeError if a device has no room after all.
    """

    def __init__(self, leaves: Mapping[str, jax.Array]) -> None:
        self._leaves = {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        self._shards: list[_Shard] = []
        self._pieces: deque[jax.Array] = deque()
        by_device: dict[jax.Device, dict[str, jax.Shard]] = defaultdict(dict)
        for name, leaf in leaves.items():
            for shard in _owned(leaf):
                by_device[shard.device][name] = shard
        for device, shards in by_device.items():
            self._copy(device, shards)

    def fetch(self) -> dict[str, np.ndarray]:
        """Wait for the copy, bring it to the host and free the devices; to be called once."""
        whole: dict[str, np.ndarray] = {}
        fetched = self._fetch_pieces()
        for shard in self._shards:
            shape, dtype = self._leaves[shard.name]
            part = np.empty(shard.shape, dtype)
            content, place = part.reshape(-1).view(np.uint8), 0
            for _ in range(shard.pieces):
                piece = next(fetched)
                content[place : place + piece.size] = piece
                place += piece.size
            if shard.shape == shape:
                whole[shard.name] = part
            else:
                whole.setdefault(shard.name, np.empty(shape, dtype))[shard.index] = part
        return whole

    def _copy(self, device: jax.Device, shards: dict[str, jax.Shard]) -> None:
        # A mesh that the caller has set need not be that of one device.
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
            copies = _in_pieces({name: s.data for name, s in shards.items()}, PIECE_BYTES)
        for name, shard in shards.items():
            pieces = copies[name]
            self._shards.append(_Shard(name, shard.index, shard.data.shape, len(pieces)))
            self._pieces += pieces

    def _fetch_pieces(self) -> Iterator[np.ndarray]:
        """The bytes of one piece after the other, the next being under way already."""
        while self._pieces:
            piece = self._pieces.popleft()
            if self._pieces:
                self._pieces[0].copy_to_host_async()
            yield np.asarray(piece).view(np.uint8)


def _owned(leaf: jax.Array) -> list[jax.Shard]:
    """Of every part of an array one copy, be it on several devices."""
    return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


@functools.partial(jax.jit, static_argnames="size")
def _in_pieces(leaves: dict[str, jax.Array], size: int) -> dict[str, list[jax.Array]]:
    """Copies of the leaves, each flat and cut every `size` bytes."""

    def cut(leaf: jax.Array) -> list[jax.Array]:
        flat, step = leaf.reshape(-1), max(size // leaf.dtype.itemsize, 1)
        # Without `copy` a piece that is the whole leaf would be its buffer, not a new one.
        return [
            jnp.copy(jax.lax.slice(flat, (start,), (min(start + step, flat.size),)))
            for start in range(0, flat.size, step)
        ]

    return {name: cut(leaf) for name, leaf in leaves.items()}
