"""A model's experts in the order of an EPLB plan (V3 report, section 3.4), with its copies."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from dsjax.model import Transformer
from dsjax.model.block import Block
from dsjax.model.moe import Moe
from dsjax.model.replicas import Replicas
from dsjax.parallel.balance import ExpertPlan
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


def with_replicas(model: Transformer, plan: ExpertPlan) -> Transformer:
    """A model of the same logits, up to round-off, whose experts lie as the plan has them.

    The plan's layers are the model's MoE layers, then those of MTP where it has more. Raises
    ValueError for another number of layers or experts. For inference: gradients of an expert's
    copies are not added up.
    """
    layers, depths = model.config.moe_layers, len(model.mtp)
    given = len(plan.physical_to_logical)
    if given not in (layers, layers + depths):
        raise ValueError(
            f"the plan has {given} layers: the model has {layers} with experts and {depths} of MTP"
        )
    model = nnx.clone(model)
    if model.moe is not None:
        _replicate(model.moe, ExpertPlan(*(part[:layers] for part in plan)))
    for depth, number in enumerate(range(layers, given)):
        of_layer = ExpertPlan(*(part[number] for part in plan))
        _replicate(model.mtp[depth].block, of_layer)
    return model


def _replicate(block: Block, plan: ExpertPlan) -> None:
    if not isinstance(block.mlp, Moe):
        raise ValueError(f"the layer has {type(block.mlp).__name__}: expected experts")
    experts, order = block.mlp.experts, jnp.asarray(plan.physical_to_logical)
    _check_exist(plan.physical_to_logical, experts.gate_up.shape[order.ndim - 1])
    weights = {name: getattr(experts, name)[...] for name in ("gate_up", "down")}
    for name, placed in place_experts(weights, order).items():
        getattr(experts, name).set_value(placed)
    places, count = (jnp.asarray(part) for part in plan[1:])
    experts.replicas = Replicas(places, count)


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
