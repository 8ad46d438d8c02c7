"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

* Keys and values are products of one latent of 512; with the shared rotary key of 64 it is all
  that decoding caches: 576 numbers a token and layer, in the order latent, key.
* Naive: expand the latent into keys and values; for training and prefill.
* Absorbed: fold the expansion into query and output and attend to the latents; for decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.init import normal, ones
from dsjax.model.norm import rms_norm
from dsjax.model.precision import exactness, project
from dsjax.model.rope import rotate, softmax_scale
from pallas_kernels import causal_attention

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from dsjax.config import Model


class Mla(nnx.Module):
    def __init__(self, config: Model, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        def weight(*shape: int) -> nnx.Param:
            return normal(rngs, shape, config.init_std, param_dtype)

        d, h, rank = config.dim, config.heads, config.q_lora_rank
        if rank is None:
            self.q = weight(d, h, config.qk_dim)
        else:
            self.q_down = weight(d, rank)
            self.q_norm = ones(rank, param_dtype)
            self.q_up = weight(rank, h, config.qk_dim)
        self.kv_down = weight(d, config.latent_dim)
        self.kv_norm = ones(config.kv_lora_rank, param_dtype)
        self.kv_up = weight(config.kv_lora_rank, h, config.qk_nope_dim + config.v_dim)
        self.out = weight(h, config.v_dim, d)
        self.config = config

    @jax.named_scope("mla_query")
    def queries(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> tuple[Float[Array, "b t h n"], Float[Array, "b t h r"]]:
        """The part without and the part with position."""
        if self.config.q_lora_rank is None:
            q = project("btd,dhq->bthq", x, self.q[...])
        else:
            low = project("btd,dr->btr", x, self.q_down[...])
            low = rms_norm(low, self.q_norm[...], self.config.norm_eps)
            q = project("btr,rhq->bthq", low, self.q_up[...])
        nope, rope = jnp.split(q, [self.config.qk_nope_dim], axis=-1)
        return nope, rotate(rope, turn)

    @jax.named_scope("mla_latent")
    def latents(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> Float[Array, "b t w"]:
        """What is cached of each token: the normalised latent and the rotated shared key."""
        low = project("btd,dw->btw", x, self.kv_down[...])
        latent, key = jnp.split(low, [self.config.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, self.kv_norm[...], self.config.norm_eps)
        return jnp.concatenate([latent, rotate(key, turn)], axis=-1)

    def naive(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t w"]]:
        """Causal attention among the tokens of x; also returns their latents."""
        nope, rope = self.queries(x, turn)
        cached = self.latents(x, turn)
        latent, key = jnp.split(cached, [self.config.kv_lora_rank], axis=-1)
        with jax.named_scope("mla_expand"):
            expanded = project("btc,chy->bthy", latent, self.kv_up[...])
            k_nope, v = jnp.split(expanded, [self.config.qk_nope_dim], axis=-1)
            k_rope = jnp.broadcast_to(key[:, :, None], (*k_nope.shape[:3], key.shape[-1]))
        with jax.named_scope("mla_attention"):
            q = jnp.concatenate([nope, rope], axis=-1)
            k = jnp.concatenate([k_nope, k_rope], axis=-1)
            attended = causal_attention(q, k, v, scale=softmax_scale(self.config))
        return self._project_out(attended), cached

    def absorbed(
        self,
        x: Float[Array, "b t d"],
        turn: Float[Array, "b t r/2 2"],
        cache: Float[Array, "b s w"],
        visible: Bool[Array, "b t s"],
    ) -> Float[Array, "b t d"]:
        """Attention of x to cached latents, those of x among them, without expanding any."""
        nope, rope = self.queries(x, turn)
        k_up, v_up = jnp.split(self.kv_up[...], [self.config.qk_nope_dim], axis=-1)
        with jax.named_scope("mla_absorb"):
            q_latent = project("bthn,chn->bthc", nope, k_up)
            q = jnp.concatenate([q_latent, rope], axis=-1)
        with jax.named_scope("mla_attention"):
            exact = exactness(q.dtype)
            # Free positions may hold anything, NaN too, and 0 * NaN would spread.
            cache = jnp.where(visible.any(axis=1)[..., None], cache, 0)
            scores = jnp.einsum(
                "bthw,bsw->bhts", q, cache, precision=exact, preferred_element_type=jnp.float32
            ) * softmax_scale(self.config)
            scores = jnp.where(visible[:, None], scores, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
            latent = cache[..., : self.config.kv_lora_rank]
            attended = jnp.einsum("bhts,bsc->bthc", weights, latent, precision=exact)
        return self._project_out(project("bthc,chv->bthv", attended, v_up))

    @jax.named_scope("mla_out")
    def _project_out(self, attended: Float[Array, "b t h v"]) -> Float[Array, "b t d"]:
        return project("bthv,hvd->btd", attended, self.out[...])
