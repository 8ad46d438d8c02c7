"""A tree of arrays as a flat table of named leaves.

Orbax casts a stored array to the dtype that is asked for without a word, so names, shapes and
dtypes are recorded beside the arrays and compared before anything is read.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dsjax.checkpoint.errors import CheckpointError

PyTree = Any
type Table = dict[str, dict[str, Any]]


def flatten(tree: PyTree) -> dict[str, Any]:
    """Name every leaf by its dotted path; raises ValueError if two leaves share a name."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "state"
        if name in leaves:
            raise ValueError(f"two leaves of the state are called {name}")
        leaves[name] = leaf
    return leaves


def check_storable(leaves: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first leaf that is no array Orbax can store."""
    if not leaves:
        raise ValueError("the state holds no arrays")
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(f"{name} is a {type(leaf).__name__}: only jax arrays can be saved")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(f"{name} is a {leaf.dtype}: save its jax.random.key_data")
        if leaf.size == 0:
            raise ValueError(f"{name} has shape {leaf.shape}: an empty array cannot be saved")


def describe(leaves: Mapping[str, Any]) -> Table:
    """The shape and dtype of every leaf, fit for JSON."""
    return {
        name: {"shape": list(np.shape(leaf)), "dtype": np.dtype(leaf.dtype).name}
        for name, leaf in leaves.items()
    }


def check_same(step: int, wanted: Table, stored: Table) -> None:
    """Raises CheckpointError naming the first leaf whose shape or dtype is not the stored one."""
    for name in [*wanted, *sorted(stored.keys() - wanted.keys())]:
        here, there = wanted.get(name), stored.get(name)
        if here != there:
            raise CheckpointError(
                f"step {step} is a checkpoint of another architecture: {name} is "
                f"{_words(here)} here and {_words(there)} in the checkpoint"
            )


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What to read for this leaf: its sharding, or this host's first device if it has none.

    Raises ValueError if its mesh is abstract (from eval_shape) and no real one is set.
    """
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    elif isinstance(sharding, jax.NamedSharding) and isinstance(
        sharding.mesh, jax.sharding.AbstractMesh
    ):
        sharding = jax.NamedSharding(_mesh_in_use(), sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _mesh_in_use() -> jax.sharding.Mesh:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        raise ValueError("the shardings name an abstract mesh: restore under jax.set_mesh")
    return mesh


def _words(leaf: dict[str, Any] | None) -> str:
    if leaf is None:
        return "absent"
    return f"{leaf['dtype']}[{','.join(map(str, leaf['shape']))}]"
