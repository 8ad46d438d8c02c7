"""Big arrays on devices, filled and read one block at a time.

Every shard is a buffer of its own that is updated in place (its memory is donated), so a block
costs its own size, whatever the array's, and goes only to the devices that hold a part of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

Cut = tuple[slice, ...]


class Leaf:
    """An array of zeros on its devices, to be filled block by block."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None = None
    ) -> None:
        self.shape, self._sharding = shape, sharding
        whole = tuple(slice(None) for _ in shape)
        places = sharding.addressable_devices_indices_map(shape) if sharding else {None: whole}
        self._cuts = {place: _plain(cut or whole, shape) for place, cut in places.items()}
        self._parts = {
            place: jnp.zeros([c.stop - c.start for c in cut], dtype, device=place)
            for place, cut in self._cuts.items()
        }

    def fill(self, block: np.ndarray, start: tuple[int, ...]) -> None:
        """Put `block`, of this array's rank, at `start`; it is cast to this array's dtype."""
        for place, cut in self._cuts.items():
            common = _overlap(cut, start, block.shape)
            if common is None:
                continue
            piece = jax.device_put(block[_relative(common, start)], place)
            at = tuple(c.start - own.start for c, own in zip(common, cut, strict=True))
            # Waiting keeps a single block in flight.
            self._parts[place] = _put(self._parts[place], piece, at).block_until_ready()

    def array(self) -> jax.Array:
        if self._sharding is None:
            return self._parts[None]
        parts = list(self._parts.values())
        return jax.make_array_from_single_device_arrays(self.shape, self._sharding, parts)


def take(array: jax.Array, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """One block of an array, on the host; ValueError if other processes hold parts of it."""
    if not array.is_fully_addressable:
        raise ValueError("the model lies on several hosts: bring it to one before saving it")
    out = None
    for shard in array.addressable_shards:
        cut = _plain(shard.index, array.shape)
        common = _overlap(cut, start, shape)
        if shard.replica_id or common is None:
            continue
        at = tuple(c.start - own.start for c, own in zip(common, cut, strict=True))
        size = tuple(c.stop - c.start for c in common)
        piece = np.asarray(_get(shard.data, at, size))
        if size == shape:
            return piece
        out = np.empty(shape, array.dtype) if out is None else out
        out[_relative(common, start)] = piece
    if out is None:
        raise ValueError(f"no part of {array.shape} lies at {start}, {shape}")
    return out


@partial(jax.jit, donate_argnums=0)
def _put(part: jax.Array, block: jax.Array, at: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(part, block.astype(part.dtype), at)


@partial(jax.jit, static_argnums=2)
def _get(part: jax.Array, at: tuple[int, ...], size: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(part, at, size)


def _plain(cut: Cut, shape: tuple[int, ...]) -> Cut:
    """The same slices with their ends filled in."""
    return tuple(slice(*c.indices(size)[:2]) for c, size in zip(cut, shape, strict=True))


def _overlap(cut: Cut, start: tuple[int, ...], size: tuple[int, ...]) -> Cut | None:
    """Where a shard and a block meet, in the array's coordinates."""
    ends = zip(cut, start, size, strict=True)
    common = tuple(slice(max(c.start, s), min(c.stop, s + n)) for c, s, n in ends)
    return common if all(c.start < c.stop for c in common) else None


def _relative(cut: Cut, start: tuple[int, ...]) -> Cut:
    return tuple(slice(c.start - s, c.stop - s) for c, s in zip(cut, start, strict=True))
