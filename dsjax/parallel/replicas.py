"""What a model rebalanced by EPLB (V3 report, 3.4) needs: weights moved, tokens spread.

Weights take the order of a plan, replicas being copies. Routing stays with the model's experts, and
an expert exchange behind it sees physical experts alone.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.fp8_weight import Fp8Weight

if TYPE_CHECKING:
    from jaxtyping import Array, Int, PyTree


def place_experts(
    weights: PyTree[Array], physical_to_logical: Int[Array, "*l replicas"]
) -> PyTree[Array]:
    """Weights [*l, e, ...] in physical order, [*l, replicas, ...]: replicas are copies.

    All arrays move, the scales of quantised weights with their values; only the gauge of an
    `Fp8Weight`, which has no experts, stays. A part of the places gives that part's weights, as one
    GPU holds them; weights in the order of an older plan take, for physical_to_logical, a place
    in that plan of each new place's expert. Raises ValueError where an array's first axes are not
    the plan's layers and as many experts as the others have, and for experts that do not exist
    (where the plan is traced they are NaN).
    """
    order = _integers("physical_to_logical", physical_to_logical, 1, 2)
    bare = jax.tree.map(_without_gauge, weights, is_leaf=_is_fp8)
    experts = _number_of_experts(bare, order.shape[:-1])
    if not isinstance(order, Tracer):
        _check_exist(np.asarray(order), experts)
    move = jax.vmap(_take) if order.ndim == 2 else _take
    moved = jax.tree.map(lambda array: move(array, order), bare)
    return jax.tree.map(_with_gauge, moved, weights, is_leaf=_is_fp8)


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


def _take(array: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(array), order, axis=0, mode="fill")


def _number_of_experts(weights: PyTree[Array], layers: tuple[int, ...]) -> int:
    experts = 0
    for path, array in jax.tree.leaves_with_path(weights):
        shape, axis = np.shape(array), len(layers)
        if shape[:axis] != layers or len(shape) <= axis or experts not in (0, shape[axis]):
            axes = ", ".join(map(str, [*layers, experts or "experts"]))
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "the weight"
            raise ValueError(f"{name} is {shape}: expected [{axes}, ...]")
        experts = shape[axis]
    return experts


def _check_exist(order: np.ndarray, experts: int) -> None:
    wrong = order[(order < 0) | (order >= experts)]
    if wrong.size:
        raise ValueError(f"physical_to_logical names expert {wrong[0]}: there are {experts}")


def _is_fp8(weight: Any) -> bool:
    return isinstance(weight, Fp8Weight)


def _without_gauge(weight: Any) -> Any:
    nothing: Any = None
    return dataclasses.replace(weight, gauge=nothing) if _is_fp8(weight) else weight


def _with_gauge(moved: Any, weight: Any) -> Any:
    return dataclasses.replace(moved, gauge=weight.gauge) if _is_fp8(weight) else moved
