"""The model: MLA, DeepSeekMoE, multi-token prediction. Adds only Flax to jax."""

from dsjax.model.attention import local_attention
from dsjax.model.block import LatentCache
from dsjax.model.embedding import look_up
from dsjax.model.moe import Experts, local_experts
from dsjax.model.placement import LOCAL, Placement
from dsjax.model.router import RouterBias, RouterStats
from dsjax.model.transformer import Transformer

__all__ = [
    "LOCAL",
    "Experts",
    "LatentCache",
    "Placement",
    "RouterBias",
    "RouterStats",
    "Transformer",
    "local_attention",
    "local_experts",
    "look_up",
]
