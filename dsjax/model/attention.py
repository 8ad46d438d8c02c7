"""How MLA's queries meet their keys: the doors of `pallas_kernels`, and jnp where no kernel fits.

A contiguous cache in BF16 and of the published widths is as well a paged one: the pages of all
layers and requests lie in a row. Any other one is attended to as it lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from dsjax.model.float32 import exactness
from pallas_kernels.latent_cache import KEY, LATENT, PAGE, WIDTH
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import plan_mla_decode

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float, Int, Int32

    from dsjax.config import Model
    from pallas_kernels.mla_decode import Plan


def causal_attention(
    q: Float[Array, "b t h q"],
    kv: Float[Array, "b t h n_plus_v"],
    k_rope: Float[Array, "b t r"],
    scale: float,
) -> Float[Array, "b t h v"]:
    """Causal attention of whole sequences, without its logarithms.

    kv: of every head the keys' part without position, then the values.
    """
    return mla_attention(q, kv, None, k_rope=k_rope, scale=scale)[0]


def lies_in_pages(config: Model, latents: Float[Array, "l b s w"]) -> bool:
    """Whether a contiguous cache is whole pages of `pallas_kernels.latent_cache`, too."""
    widths = config.kv_lora_rank, config.qk_rope_dim
    whole = latents.shape[2] % PAGE == 0
    return widths == (LATENT, KEY) and latents.dtype == jnp.bfloat16 and whole


def pages_of(
    latents: BFloat16[Array, "l b s 576"], layer: Int[Array, ""] | int
) -> tuple[BFloat16[Array, "pages 64 576"], Int32[Array, "b max_pages"]]:
    """The pages of all layers, which are the cache itself, and the block table of one layer."""
    _, b, s, _ = latents.shape
    first = jnp.asarray(layer, jnp.int32) * (b * s // PAGE)
    table = first + jnp.arange(b * s // PAGE, dtype=jnp.int32).reshape(b, s // PAGE)
    return latents.reshape(-1, PAGE, WIDTH), table


def plan_decode(
    config: Model, latents: Float[Array, "l b s w"], lengths: Int[Array, " b"], queries: int
) -> Plan | None:
    """What `Mla.absorbed` takes for all layers of a step; None for a cache not in pages."""
    if not lies_in_pages(config, latents):
        return None
    return plan_mla_decode(lengths.astype(jnp.int32), queries=queries, heads=config.heads)


def attend_to_rows(
    q: Float[Array, "b t h w"],
    latents: Float[Array, "b s w"],
    lengths: Int[Array, " b"],
    *,
    rank: int,
    scale: float,
) -> Float[Array, "b t h c"]:
    """`mla_decode` of a contiguous cache of any width and dtype, whose first `rank` are values."""
    exact, t, position = exactness(q.dtype), q.shape[1], jnp.arange(latents.shape[1])
    visible = position < (lengths[:, None] - t + 1 + jnp.arange(t))[..., None]
    # Free positions may hold anything, NaN too, and 0 * NaN would spread.
    latents = jnp.where((position < lengths[:, None])[..., None], latents, 0)
    scores = jnp.einsum(
        "bthw,bsw->bhts", q, latents, precision=exact, preferred_element_type=jnp.float32
    )
    scores = jnp.where(visible[:, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bhts,bsc->bthc", weights, latents[..., :rank], precision=exact)
