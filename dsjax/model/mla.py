"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

* Keys and values are products of one latent of 512; with the shared rotary key of 64 it is all
  that decoding caches: 576 numbers a token and layer, in the order latent, key.
* Naive: expand the latent into keys and values; for training and prefill.
* Absorbed: fold the expansion into query and output and attend to the latents; for decoding, on
  the contiguous cache of all layers.
* Paged: absorbed, on pages in BF16 or FP8; for decoding, for a prompt chunk by chunk, and sparse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.attention import attend_to_rows, causal_attention, lies_in_pages, pages_of
from dsjax.model.init import normal, ones
from dsjax.model.norm import rms_norm
from dsjax.model.precision import project, project_all
from dsjax.model.rope import rotate, softmax_scale
from pallas_kernels.kept import kept
from pallas_kernels.latent_cache import write_latents
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_sparse import mla_sparse_decode

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float, Int, Int32, UInt8

    from dsjax.config import Model
    from pallas_kernels.mla_decode import Plan

    PagedCache = BFloat16[Array, "pages 64 576"] | UInt8[Array, "pages 64 656"]


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

    @jax.named_scope("mla_down")
    def _down(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t ..."], ...]:
        """What queries and latents are made of: x times the two weights that it meets."""
        if self.config.q_lora_rank is None:
            query, equation = self.q, "btd,dhq->bthq"
        else:
            query, equation = self.q_down, "btd,dr->btr"
        return kept(project_all((equation, "btd,dw->btw"), x, (query[...], self.kv_down[...])))

    @jax.named_scope("mla_query")
    def _queries(
        self, low: Float[Array, "b t ..."], turn: Float[Array, "b t r/2 2"]
    ) -> tuple[Float[Array, "b t h n"], Float[Array, "b t h r"]]:
        """The part without and the part with position, from the first of `_down`."""
        q = low
        if self.config.q_lora_rank is not None:
            low = rms_norm(low, self.q_norm[...], self.config.norm_eps)
            q = project("btr,rhq->bthq", low, self.q_up[...])
        nope, rope = jnp.split(q, [self.config.qk_nope_dim], axis=-1)
        return nope, rotate(rope, turn)

    @jax.named_scope("mla_latent")
    def _latents(
        self, low: Float[Array, "b t w"], turn: Float[Array, "b t r/2 2"]
    ) -> Float[Array, "b t w"]:
        latent, key = jnp.split(low, [self.config.kv_lora_rank], axis=-1)
        latent = rms_norm(latent, self.kv_norm[...], self.config.norm_eps)
        return jnp.concatenate([latent, rotate(key, turn)], axis=-1)

    def queries(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> tuple[Float[Array, "b t h n"], Float[Array, "b t h r"]]:
        """The part without and the part with position."""
        return self._queries(self._down(x)[0], turn)

    def latents(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> Float[Array, "b t w"]:
        """What is cached of each token: the normalised latent and the rotated shared key."""
        return self._latents(self._down(x)[1], turn)

    def naive(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t w"]]:
        """Causal attention among the tokens of x; also returns their latents."""
        query, low = self._down(x)
        nope, rope = self._queries(query, turn)
        cached = self._latents(low, turn)
        latent, key = jnp.split(cached, [self.config.kv_lora_rank], axis=-1)
        with jax.named_scope("mla_expand"):
            expanded = project("btc,chy->bthy", latent, self.kv_up[...])
        with jax.named_scope("mla_attention"):
            q = jnp.concatenate([nope, rope], axis=-1)
            attended = causal_attention(q, expanded, key, softmax_scale(self.config))
        return self._project_out(attended), cached

    def absorbed(
        self,
        x: Float[Array, "b t d"],
        turn: Float[Array, "b t r/2 2"],
        cache: Float[Array, "l b s w"],
        layer: Int[Array, ""] | int,
        lengths: Int[Array, " b"],
        plan: Plan | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b s w"]]:
        """Attention of x to a layer of the cache, and the cache with x's latents, written first.

        x are the last t of each row's `lengths` tokens, of which there are at least t. plan:
        `plan_decode`'s for these lengths. Under jit what the cache has no room for is dropped; in
        place where the cache is donated or carried through a loop.
        """
        if lies_in_pages(self.config, cache) and x.dtype == cache.dtype:
            pages, table = pages_of(cache, layer)
            out, pages = self.paged(x, turn, pages, table, lengths.astype(jnp.int32), plan)
            return out, pages.reshape(cache.shape)
        t = x.shape[1]
        row, at = jnp.arange(x.shape[0])[:, None], (lengths - t)[:, None] + jnp.arange(t)
        new = self.latents(x, turn).astype(cache.dtype)
        cache = cache.at[layer, row, at].set(new, mode="drop")
        q = self._absorbed_queries(x, turn)
        with jax.named_scope("mla_attention"):
            attended = attend_to_rows(q, cache[layer], lengths, rank=self.config.kv_lora_rank,
                                      scale=softmax_scale(self.config))  # fmt: skip
        return self._project_latents_out(attended), cache

    def paged(
        self,
        x: BFloat16[Array, "b t d"],
        turn: Float[Array, "b t r/2 2"],
        cache: PagedCache,
        block_table: Int32[Array, "b max_pages"],
        lengths: Int32[Array, " b"],
        plan: Plan | None = None,
        chosen: Int32[Array, "b t k"] | None = None,
    ) -> tuple[BFloat16[Array, "b t d"], PagedCache]:
        """Attention of x to a paged cache, and the cache with x's latents, which it writes first.

        x are the last t of each request's `lengths` tokens. One that stands before a request's
        first, as all do where the length is 0, is not written, and its result is 0. Cache and
        table are those of `pallas_kernels.latent_cache`, plan is `plan_mla_decode`'s for these
        lengths; in place where the cache is donated or carried through a loop. chosen: the tokens
        that each query attends to, as page * 64 + row, -1 for none, instead of all up to its own.
        ValueError for other dtypes and for a model of other widths than 512 and 64.
        """
        t = x.shape[1]
        positions = (lengths - t)[:, None] + jnp.arange(t, dtype=jnp.int32)
        turn = jnp.broadcast_to(turn, (*x.shape[:2], *turn.shape[2:]))
        with jax.named_scope("mla_latent"):
            down = project("btd,dw->btw", x, self.kv_down[...])
            cache = write_latents(cache, down, self.kv_norm[...], turn, block_table, positions,
                                  eps=self.config.norm_eps)  # fmt: skip
        q, scale = self._absorbed_queries(x, turn), softmax_scale(self.config)
        with jax.named_scope("mla_attention"):
            if chosen is None:
                attended, _ = mla_decode(q, cache, block_table, lengths, scale=scale, plan=plan)
            else:
                attended, _ = mla_sparse_decode(q, cache, chosen, scale=scale)
        return self._project_latents_out(attended), cache

    @jax.named_scope("mla_absorb")
    def _absorbed_queries(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"]
    ) -> Float[Array, "b t h w"]:
        nope, rope = self.queries(x, turn)
        q_latent = project("bthn,chn->bthc", nope, self._kv_up_parts()[0])
        return jnp.concatenate([q_latent, rope], axis=-1)

    def _kv_up_parts(self) -> tuple[Float[Array, "c h n"], Float[Array, "c h v"]]:
        """What makes keys of latents, and what makes values."""
        keys, values = jnp.split(self.kv_up[...], [self.config.qk_nope_dim], axis=-1)
        return keys, values

    def _project_latents_out(self, attended: Float[Array, "b t h c"]) -> Float[Array, "b t d"]:
        return self._project_out(project("bthc,chv->bthv", attended, self._kv_up_parts()[1]))

    @jax.named_scope("mla_out")
    def _project_out(self, attended: Float[Array, "b t h v"]) -> Float[Array, "b t d"]:
        return project("bthv,hvd->btd", attended, self.out[...], power_of_two=True)
