"""Multi-token prediction (V3 section 2.2): one more layer a depth, predicting one token further.

The projection takes the embedding first and the hidden state second, as the released weights do
(the report's equation 21 has them the other way round), and the hidden state after its norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.block import Block
from dsjax.model.init import normal, ones
from dsjax.model.norm import rms_norm
from dsjax.model.precision import project

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from dsjax.config import Model
    from dsjax.model.placement import Placement
    from dsjax.model.router import RouterStats


class Mtp(nnx.Module):
    def __init__(self, config: Model, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.enorm = ones(config.dim, param_dtype)
        self.hnorm = ones(config.dim, param_dtype)
        self.project = normal(rngs, (2 * config.dim, config.dim), config.init_std, param_dtype)
        self.block = Block(config, True, rngs=rngs, param_dtype=param_dtype)
        self.norm = ones(config.dim, param_dtype)
        self.eps = config.norm_eps

    @jax.named_scope("mtp")
    def __call__(
        self,
        hidden: Float[Array, "b t d"],
        embedded: Float[Array, "b t d"],
        turn: Float[Array, "b t r/2 2"],
        placement: Placement,
    ) -> tuple[Float[Array, "b t d"], RouterStats | None]:
        """Normed hidden states one token further on, given the embeddings of those tokens."""
        both = jnp.concatenate(
            [
                rms_norm(embedded, self.enorm[...], self.eps),
                rms_norm(hidden, self.hnorm[...], self.eps),
            ],
            axis=-1,
        )
        x, _, stats = self.block(project("btx,xd->btd", both, self.project[...]), turn, placement)
        return rms_norm(x, self.norm[...], self.eps), stats
