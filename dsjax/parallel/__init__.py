"""Devices: the mesh, what is spread over it and how."""

from dsjax.parallel.mesh import build_mesh
from dsjax.parallel.sharding import batch_sharding, placement_on, state_shardings

__all__ = ["batch_sharding", "build_mesh", "placement_on", "state_shardings"]
