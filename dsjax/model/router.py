"""Which experts a token is sent to, and how heavily each counts.

* Affinities are softmax (V2) or sigmoid (V3) of the token against each expert, in float32.
* Selection: plain top-k; the best groups by their best expert (V2); or by their two best biased
  experts (V3's noaux_tc). Groups that lose are masked with -inf: a biased affinity may be negative.
* The bias only selects. The weights are the unbiased affinities of the chosen experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.float32 import float32_product
from dsjax.model.init import normal

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Model


SMALLEST_SUM = 1e-12
"""Least denominator of a normalisation; its square, which gradients divide by, is still a float."""


class RouterBias(nnx.Variable):
    """V3's balancing bias: a type of its own keeps it from gradients, decay and the optimizer."""


class Routing(NamedTuple):
    experts_TK: Int[Array, "T k"]
    weights_TK: Float[Array, "T k"]
    scores_TE: Float[Array, "T e"]


class Router(nnx.Module):
    def __init__(self, config: Model, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.weight = normal(rngs, (config.dim, config.experts), config.init_std, param_dtype)
        self.bias = RouterBias(jnp.zeros((config.experts,), jnp.float32))
        self.config = config

    @jax.named_scope("router")
    def __call__(self, x_TD: Float[Array, "T d"]) -> Routing:
        logits = float32_product(x_TD, self.weight[...].astype(jnp.float32))
        softmax = self.config.gate == "softmax"
        scores = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
        experts = select_experts(scores, self.bias[...], self.config)
        return Routing(experts, gate_weights(scores, experts, self.config), scores)


def select_experts(
    scores_TE: Float[Array, "T e"], bias_E: Float[Array, " e"], config: Model
) -> Int[Array, "T k"]:
    """The k experts of each token by the rule `config.selection`; no gradient passes."""
    ranking = jax.lax.stop_gradient(scores_TE)
    if config.selection == "noaux_tc":
        ranking = ranking + bias_E
    if config.selection != "greedy" and config.groups > 1:
        ranking = _keep_best_groups(ranking, config)
    return jax.lax.top_k(ranking, config.top_k)[1]


def _keep_best_groups(ranking_TE: Float[Array, "T e"], config: Model) -> Float[Array, "T e"]:
    grouped = ranking_TE.reshape(-1, config.groups, config.experts // config.groups)
    judged_by = 2 if config.selection == "noaux_tc" else 1
    group_score = jax.lax.top_k(grouped, judged_by)[0].sum(axis=-1)
    best = jax.lax.top_k(group_score, config.top_groups)[1]
    kept = jax.nn.one_hot(best, config.groups, dtype=bool).any(axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranking_TE.shape)


def gate_weights(
    scores_TE: Float[Array, "T e"], experts_TK: Int[Array, "T k"], config: Model
) -> Float[Array, "T k"]:
    """Affinities of the chosen experts, normalised if the model does so, times route_scale."""
    chosen = jax.nn.one_hot(experts_TK, config.experts, dtype=scores_TE.dtype)
    weights = (chosen * scores_TE[:, None]).sum(axis=-1)
    if config.norm_topk:
        weights = weights / jnp.maximum(weights.sum(axis=-1, keepdims=True), SMALLEST_SUM)
    return weights * config.route_scale


class RouterStats(NamedTuple):
    """What balancing needs of one layer, or of several along a leading axis."""

    load_E: Int[Array, "*l e"]
    """Tokens sent to each expert."""
    share_E: Float[Array, "*l e"]
    """Mean over the tokens of each expert's share of their affinities."""
    sequence_aux: Float[Array, "*l"]
    """Sequence-wise auxiliary loss, V3 equations 17 to 20 on the experts used, unweighted."""

    @property
    def batch_aux(self) -> Float[Array, "*l"]:
        """The same product over the batch as a whole: the classic auxiliary loss, unweighted."""
        load = self.load_E.astype(jnp.float32)
        even = load.shape[-1] / jnp.maximum(load.sum(axis=-1), 1)
        return (load * self.share_E).sum(axis=-1) * even


def router_stats(routing: Routing, batch: int) -> RouterStats:
    """Load and both auxiliary losses of a batch of `batch` equal sequences."""
    tokens, k = routing.experts_TK.shape
    experts = routing.scores_TE.shape[-1]
    used = jax.nn.one_hot(routing.experts_TK, experts, dtype=jnp.float32).sum(axis=1)
    used_BE = used.reshape(batch, -1, experts).sum(axis=1)
    total = jnp.maximum(routing.scores_TE.sum(axis=-1, keepdims=True), SMALLEST_SUM)
    share = routing.scores_TE / total
    share_BE = share.reshape(batch, -1, experts).mean(axis=1)
    even = experts / (k * (tokens // batch))
    load = used_BE.sum(axis=0)
    return RouterStats(
        load_E=load.astype(jnp.int32),
        share_E=share_BE.mean(axis=0),
        sequence_aux=(used_BE * even * share_BE).sum(axis=-1).mean(),
    )
