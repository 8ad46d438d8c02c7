"""Devices: the mesh, what is spread over it and how, and how tokens reach experts elsewhere."""

from dsjax.parallel.choose import choose_exchange
from dsjax.parallel.devices import ALONE, Alone, Meshed
from dsjax.parallel.mesh import build_mesh
from dsjax.parallel.sharding import batch_sharding, state_shardings

__all__ = [
    "ALONE",
    "Alone",
    "Meshed",
    "batch_sharding",
    "build_mesh",
    "choose_exchange",
    "state_shardings",
]
