"""Several copies of heavily loaded experts (EPLB; V3 report, section 3.4) and tokens among them.

Routing stays with the model's experts; behind it only the copies are known, by their places.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

if TYPE_CHECKING:
    from jaxtyping import Array, Int


class ReplicaMap(nnx.Variable):
    """Where copies lie: no gradient, no optimizer and no checkpoint of a run takes it."""


class Replicas(nnx.Module):
    """The places of each expert's copies, [*l, e, most], and how many there are, [*l, e]."""

    def __init__(self, places: Int[Array, "*l e most"], count: Int[Array, "*l e"]):
        self.places = ReplicaMap(jnp.asarray(places, jnp.int32))
        self.count = ReplicaMap(jnp.asarray(count, jnp.int32))

    def __call__(self, experts_TK: Int[Array, "T k"]) -> Int[Array, "T k"]:
        return spread_over_replicas(experts_TK, self.places[...], self.count[...])


def spread_over_replicas(
    experts_TK: Int[Array, "T k"],
    logical_to_physical: Int[Array, "e most"],
    logical_count: Int[Array, " e"],
    start: int | Int[Array, ""] = 0,
) -> Int[Array, "T k"]:
    """The place of one replica of each chosen expert; a choice of -1, no expert, stays -1.

    The replicas of an expert take turns along the tokens, every choice one replica on from the one
    before. start: where turns begin; devices that hold few tokens each should give their number,
    or an expert's first replica would get most. One layer's part of a plan; raises ValueError on
    shapes that do not fit and on ids that are no integers.
    """
    experts = _integers("experts_TK", experts_TK, 2)
    places = _integers("logical_to_physical", logical_to_physical, 2)
    count = _integers("logical_count", logical_count, 1)
    if len(places) != len(count):
        raise ValueError(
            f"logical_to_physical is {places.shape}, logical_count {count.shape}: expected "
            "[e, most] and [e]"
        )
    tokens, k = experts.shape
    turn = start + jnp.arange(tokens)[:, None] + jnp.arange(k)
    expert = jnp.maximum(experts, 0)
    chosen = places[expert, turn % count[expert]]
    return jnp.where(experts < 0, -1, chosen).astype(experts.dtype)


def _integers(name: str, array: Any, *ranks: int) -> jax.Array:
    array = jnp.asarray(array)
    if array.ndim not in ranks or not jnp.issubdtype(array.dtype, jnp.integer):
        axes = " or ".join(map(str, ranks))
        raise ValueError(f"{name} is {array.dtype} {array.shape}: expected integers, {axes} axes")
    return array
