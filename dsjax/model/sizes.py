"""How large a model is, without building it: parameters, active parameters, cache, work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
from flax import nnx

from dsjax.model.transformer import Transformer

if TYPE_CHECKING:
    from dsjax.config import Model


@dataclass(frozen=True)
class Sizes:
    """Counts of parameters and bytes; MTP is counted apart, as the V3 report does."""

    total: int
    """Without MTP and without the router bias."""
    active: int
    """Those a token is multiplied with: the embedding is a look-up and does not count."""
    mtp: int
    """MTP's own parameters; it shares embedding and head with the main model."""
    mtp_projection: int
    """Of these, the projection, which the report's 11.5B leave out."""
    mtp_active: int
    """A token's share of MTP, the shared embedding and head included."""
    cache_bytes: int
    """Latent cache of one token in bf16."""


def measure(config: Model) -> Sizes:
    """Sizes of a model, from the shapes of its arrays (`jax.eval_shape`): no memory is spent."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    main, mtp = 0, 0
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(leaf))
        if path[0] == "mtp":
            mtp += count
        else:
            main += count
    expert = 3 * config.dim * config.expert_hidden
    idle = (config.experts - config.top_k) * expert
    table = config.vocab_size * config.dim
    return Sizes(
        total=main,
        active=main - config.moe_layers * idle - table,
        mtp=mtp,
        mtp_projection=config.mtp_depth * 2 * config.dim**2,
        mtp_active=mtp - config.mtp_depth * idle + (2 * table if config.mtp_depth else 0),
        cache_bytes=2 * config.layers * config.latent_dim,
    )


@dataclass(frozen=True)
class Work:
    """Floating-point operations of training on one token: forward and twice that backward."""

    causal: float
    """Attention counted for the keys a token sees: half of them on average."""
    full: float
    """Attention counted for all keys, as DeepSeek's published 43.73 % MFU does."""


def training_work(config: Model, seq_len: int) -> Work:
    """Model FLOPs a token (6 a multiplied parameter, plus attention), nothing recomputed."""
    sizes = measure(config)
    matmuls = sizes.active
    if config.mtp_depth:
        head = config.vocab_size * config.dim
        expert = 3 * config.dim * config.expert_hidden
        idle = (config.experts - config.top_k) * expert
        matmuls += sizes.mtp - config.mtp_depth * idle + config.mtp_depth * head
    layers = config.layers + config.mtp_depth
    attention = 6 * layers * config.heads * (config.qk_dim + config.v_dim) * seq_len
    return Work(causal=6 * matmuls + attention / 2, full=6 * matmuls + attention)
