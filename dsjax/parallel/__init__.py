"""Devices: the mesh, what is spread over it and how, how tokens reach experts elsewhere, EPLB."""

from dsjax.parallel.balance import ExpertPlan, rebalance_experts
from dsjax.parallel.choose import choose_exchange
from dsjax.parallel.devices import ALONE, Alone, Meshed
from dsjax.parallel.loads import LoadWindow, gpu_loads, imbalance
from dsjax.parallel.mesh import build_mesh
from dsjax.parallel.replicas import place_experts, with_replicas
from dsjax.parallel.sharding import batch_sharding, state_shardings

__all__ = [
    "ALONE",
    "Alone",
    "ExpertPlan",
    "LoadWindow",
    "Meshed",
    "batch_sharding",
    "build_mesh",
    "choose_exchange",
    "gpu_loads",
    "imbalance",
    "place_experts",
    "rebalance_experts",
    "state_shardings",
    "with_replicas",
]
