"""The model: MLA, DeepSeekMoE, multi-token prediction. Adds only Flax to jax."""

from dsjax.model.block import LatentCache
from dsjax.model.moe import routed_experts
from dsjax.model.placement import LOCAL, Placement
from dsjax.model.router import RouterBias, RouterStats
from dsjax.model.transformer import Transformer

__all__ = [
    "LOCAL",
    "LatentCache",
    "Placement",
    "RouterBias",
    "RouterStats",
    "Transformer",
    "routed_experts",
]
