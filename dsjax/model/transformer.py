"""DeepSeek-V2/V3 as one module.

* Layers of a kind are stacked and scanned: one compilation and one set of arrays for all of them.
* `model(tokens)` gives logits; `hidden`, `logits` and `predict_further` are what training needs;
  `prefill` and `decode` work on the latent cache.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypedDict

import jax
import jax.core
import jax.numpy as jnp
from flax import nnx

from dsjax.model.attention import plan_decode
from dsjax.model.block import Block, LatentCache, stack_blocks, walk_layers
from dsjax.model.embedding import look_up
from dsjax.model.float32 import project_to_logits
from dsjax.model.init import normal, ones
from dsjax.model.mtp import Mtp
from dsjax.model.norm import rms_norm
from dsjax.model.placement import LOCAL, Placement
from dsjax.model.precision import STACKED, compute_dtype
from dsjax.model.rope import rotation
from dsjax.model.router import RouterStats

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Model, Precision, Remat


class _Kinds(TypedDict):
    rngs: nnx.Rngs
    param_dtype: jnp.dtype


class Transformer(nnx.Module):
    """A model of `config`: parameters stored in `param_dtype`, computed with in `precision`."""

    def __init__(
        self,
        config: Model,
        *,
        rngs: nnx.Rngs,
        param_dtype: jnp.dtype = jnp.dtype(jnp.float32),  # noqa: B008
        precision: Precision = "fp32",
    ):
        compute_dtype(precision)
        std, kinds = config.init_std, _Kinds(rngs=rngs, param_dtype=param_dtype)
        self.embed = normal(rngs, (config.vocab_size, config.dim), std, param_dtype)
        self.dense = stack_blocks(config.dense_layers, config, False, **kinds)
        self.moe = stack_blocks(config.moe_layers, config, True, **kinds)
        self.norm = ones(config.dim, param_dtype)
        self.head = normal(rngs, (config.dim, config.vocab_size), std, param_dtype)
        self.mtp = nnx.List([Mtp(config, **kinds) for _ in range(config.mtp_depth)])
        self.config = config
        self.precision = precision

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t p"]:
        """Float32 logits of the token after each.

        ValueError if tokens are not integers [batch, time] or, outside jit, beyond the vocabulary.
        """
        tokens = jnp.asarray(tokens)
        _check_tokens(tokens, self.config.vocab_size)
        return self.logits(self.hidden(tokens)[0])

    @jax.named_scope("embed")
    def embedded(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return look_up(self.embed[...], tokens, compute_dtype(self.precision))

    @jax.named_scope("head")
    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... p"]:
        """Float32 logits of normed hidden states."""
        return project_to_logits(hidden, self.head[...].astype(hidden.dtype))

    def hidden(
        self, tokens: Int[Array, "b t"], placement: Placement = LOCAL, remat: Remat = "none"
    ) -> tuple[Float[Array, "b t d"], RouterStats | None]:
        """Normed hidden states and the routing of all MoE layers, [l, ...]."""
        x, _, stats = self._layers(tokens, placement, remat, keep_latents=False)
        return rms_norm(x, self.norm[...], self.config.norm_eps), stats

    def predict_further(
        self,
        hidden: Float[Array, "b t d"],
        following: Int[Array, "d b t"],
        placement: Placement = LOCAL,
    ) -> tuple[list[Float[Array, "b t d"]], RouterStats | None]:
        """Normed hidden states of each MTP depth; following[i] holds the tokens i + 1 later."""
        turn = rotation(self.config, _positions(following[0])) if self.mtp else None
        depths, stats = [], []
        for mtp, tokens in zip(self.mtp, following, strict=True):
            embedded = self.embedded(tokens)
            hidden, routed = placement.gather("mtp", mtp)(hidden, embedded, turn, placement)
            depths.append(hidden)
            stats.append(routed)
        return depths, jax.tree.map(lambda *leaf: jnp.stack(leaf), *stats) if stats else None

    def prefill(
        self, tokens: Int[Array, "b t"], lengths: Int[Array, " b"], capacity: int
    ) -> tuple[Float[Array, "b p"], LatentCache]:
        """Logits after each prompt's last token and a cache with room for `capacity` tokens."""
        x, latents, _ = self._layers(tokens, LOCAL, "none", keep_latents=True)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        room = ((0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0))
        normed = rms_norm(last, self.norm[...], self.config.norm_eps)
        return self.logits(normed), LatentCache(jnp.pad(jnp.concatenate(latents), room), lengths)

    def decode(
        self, tokens: Int[Array, "b t"], cache: LatentCache
    ) -> tuple[Float[Array, "b t p"], LatentCache]:
        """Logits after each new token; t > 1 verifies several guesses at once."""
        t, start = tokens.shape[1], cache.lengths
        turn = rotation(self.config, start[:, None] + jnp.arange(t))
        plan = plan_decode(self.config, cache.latents, start + t, t)

        def layer(
            carry: tuple[jax.Array, jax.Array], stacked: tuple[Block, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            block, number = stacked
            return block.decode(carry[0], turn, carry[1], number, start + t, LOCAL, plan), None

        # The whole cache is carried, so that XLA writes the new tokens in place.
        carry, layers = (self.embedded(tokens), cache.latents), jnp.arange(self.config.layers)
        dense, moe = jnp.split(layers, [self.config.dense_layers])
        for blocks, numbers in ((self.dense, dense), (self.moe, moe)):
            if blocks is not None:
                carry, _ = jax.lax.scan(layer, carry, (blocks, numbers))
        x, latents = carry
        x = rms_norm(x, self.norm[...], self.config.norm_eps)
        return self.logits(x), LatentCache(latents, start + t)

    def _layers(
        self, tokens: Int[Array, "b t"], placement: Placement, remat: Remat, keep_latents: bool
    ) -> tuple[Float[Array, "b t d"], list[Float[Array, "l b t w"]], RouterStats | None]:
        x = self.embedded(tokens)
        turn = rotation(self.config, _positions(tokens))

        def layer(kind: str, x: jax.Array, block: Block) -> tuple[jax.Array, tuple]:
            x, latents, stats = placement.gather(kind, block)(x, turn, placement)
            return x, (latents if keep_latents else None, stats)

        kept, stats = [], None
        for kind in STACKED:
            if (blocks := getattr(self, kind)) is not None:
                one = functools.partial(layer, kind)
                x, (latents, stats) = walk_layers(one, x, blocks, remat, placement.gathers)
                kept.append(latents)
        return x, kept, stats


def _positions(tokens: Int[Array, "b t"]) -> Int[Array, "1 t"]:
    return jnp.arange(tokens.shape[1])[None]


def _check_tokens(tokens: Int[Array, "b t"], vocab_size: int) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens are {tokens.dtype} {tokens.shape}: expected integers [batch, time]"
        )
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:
        return
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size}")
