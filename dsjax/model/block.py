"""One transformer layer, and a stack of equal ones that is scanned."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.init import ones
from dsjax.model.mla import Mla
from dsjax.model.moe import Mlp, Moe
from dsjax.model.norm import rms_norm
from dsjax.model.placement import GATHERED, Placement
from dsjax.model.router import RouterStats
from pallas_kernels.kept import KEPT, kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Array, Float, Int

    from dsjax.config import Model, Remat
    from pallas_kernels.mla_decode import Plan

# The first is for ZeRO-3, and not in FP8, where it would keep weights as layers have cast them.
POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "v3": jax.checkpoint_policies.save_only_these_names(KEPT),
    "layer": jax.checkpoint_policies.nothing_saveable,
}


WRITTEN_OUT = 24
"""Most layers of a kind that are not scanned."""


class LatentCache(NamedTuple):
    """Latents of every layer and token so far; positions from `lengths` on are free."""

    latents: Float[Array, "l b s w"]
    lengths: Int[Array, " b"]


class Block(nnx.Module):
    def __init__(self, config: Model, moe: bool, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.attn_norm = ones(config.dim, param_dtype)
        self.attn = Mla(config, rngs=rngs, param_dtype=param_dtype)
        self.mlp_norm = ones(config.dim, param_dtype)
        if moe:
            self.mlp = Moe(config, rngs=rngs, param_dtype=param_dtype)
        else:
            self.mlp = Mlp(config.dim, config.dense_hidden, config.init_std,
                           rngs=rngs, param_dtype=param_dtype)  # fmt: skip
        self.eps = config.norm_eps

    def __call__(
        self, x: Float[Array, "b t d"], turn: Float[Array, "b t r/2 2"], placement: Placement
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t w"], RouterStats | None]:
        """The layer on whole sequences; also its latents and, for MoE, its routing."""
        normed = rms_norm(x, self.attn_norm[...], self.eps)
        attended, latents = self.attn.naive(normed, turn)
        x, stats = self._feed_forward(kept(x + attended), placement)
        return x, latents, stats

    def decode(
        self,
        x: Float[Array, "b t d"],
        turn: Float[Array, "b t r/2 2"],
        latents: Float[Array, "l b s w"],
        layer: Int[Array, ""],
        lengths: Int[Array, " b"],
        placement: Placement,
        plan: Plan | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b s w"]]:
        """Layer number `layer` on each row's last t of `lengths` tokens; writes their latents.

        plan: `plan_decode`'s for these lengths.
        """
        normed = rms_norm(x, self.attn_norm[...], self.eps)
        attended, latents = self.attn.absorbed(normed, turn, latents, layer, lengths, plan)
        return self._feed_forward(x + attended, placement)[0], latents

    def _feed_forward(
        self, x: Float[Array, "b t d"], placement: Placement
    ) -> tuple[Float[Array, "b t d"], RouterStats | None]:
        normed = rms_norm(x, self.mlp_norm[...], self.eps)
        if isinstance(self.mlp, Moe):
            out, stats = self.mlp(normed, placement.exchange)
            return x + out, stats
        with jax.named_scope("dense_mlp"):
            return x + self.mlp(normed), None


def stack_blocks(
    count: int, config: Model, moe: bool, *, rngs: nnx.Rngs, param_dtype: jnp.dtype
) -> Block | None:
    """`count` layers as one module whose arrays have a leading layer axis; None for no layers."""
    if count == 0:
        return None

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, moe, rngs=rngs, param_dtype=param_dtype)

    return build(rngs)


def walk_layers(
    layer: Callable, x: Float[Array, "b t d"], blocks: Block, remat: Remat, gathered: bool
) -> tuple[Float[Array, "b t d"], Any]:
    """`x, y = layer(x, block)` for every layer in turn; the last x, and all y stacked.

    Few layers are written out: a scan copies what the backward pass keeps into arrays of all
    layers and out again, a tenth of a training step of `h200_3b`. Many are scanned: they compile
    once. Weights that a layer has `gathered` are not kept.
    """
    count = len(jax.tree.leaves(blocks)[0])
    if count > WRITTEN_OUT:
        return jax.lax.scan(_rematerialised(layer, remat, gathered, scanned=True), x, blocks)
    # Equal layers are traced and lowered once, as those of a scan.
    layer, results = jax.jit(_rematerialised(layer, remat, gathered, scanned=False)), []
    leaves, structure = jax.tree.flatten(blocks)
    for leaf in zip(*[_apart(leaf, count) for leaf in leaves], strict=True):
        x, result = layer(x, jax.tree.unflatten(structure, leaf))
        results.append(result)
    return x, jax.tree.map(lambda *leaf: jnp.stack(leaf), *results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _apart(stacked: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The layers of an array; their gradients are put together only where they are used."""
    return tuple(stacked[number] for number in range(count))


_apart.defvjp(
    lambda stacked, count: (_apart(stacked, count), None),
    lambda count, _, grads: (jnp.stack(grads),),
)


def _rematerialised(layer: Callable, remat: Remat, gathered: bool, *, scanned: bool) -> Callable:
    """What the backward pass recomputes: nothing, all but matmul results, what V3 does (norms,
    up-projections, SwiGLU), or whole layers. Norms and SwiGLU it always does."""
    if remat == "none" and not gathered:
        return layer
    return jax.checkpoint(layer, policy=POLICIES[remat], prevent_cse=not scanned)
