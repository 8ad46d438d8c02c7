"""What lies where: state divided over `fsdp`, batches over both axes, layers gathered for use."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.model import LOCAL, Placement, local_attention, local_experts, look_up
from dsjax.model.precision import STACKED
from dsjax.parallel.mesh import AXES

if TYPE_CHECKING:
    from jaxtyping import PyTree

SMALL = 1024
"""Arrays of fewer elements are replicated: dividing them saves nothing."""


def fsdp_spec(shape: tuple[int, ...], devices: int, stacked: bool) -> P:
    """Divide the longest axis that divides evenly, never that of layers; else replicate."""
    size = 1
    for n in shape:
        size *= n
    axes = range(1 if stacked else 0, len(shape))
    fitting = [axis for axis in axes if shape[axis] % devices == 0]
    if devices == 1 or size < SMALL or not fitting:
        return P()
    longest = max(fitting, key=lambda axis: shape[axis])
    return P(*[None] * longest, "fsdp")


def state_shardings(state: PyTree[jax.ShapeDtypeStruct], mesh: Mesh) -> PyTree[NamedSharding]:
    """A sharding for every array of a train state, optimizer moments like their parameters."""

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = {str(getattr(key, "key", getattr(key, "name", ""))) for key in path}
        spec = fsdp_spec(leaf.shape, mesh.shape["fsdp"], not names.isdisjoint(STACKED))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences spread over all devices."""
    return NamedSharding(mesh, P(AXES))


def placement_on(mesh: Mesh) -> Placement:
    """The model's placement on a mesh: each device has its own sequences, weights are gathered."""
    if mesh.size == 1:
        return LOCAL
    whole, spread = NamedSharding(mesh, P()), batch_sharding(mesh)

    def gather(weights: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, whole), weights)

    experts = jax.shard_map(
        local_experts,
        mesh=mesh,
        in_specs=(P(AXES), P(AXES), P(AXES), P(), P()),
        out_specs=P(AXES),
        check_vma=False,
    )

    def attention(q: jax.Array, kv: jax.Array, k_rope: jax.Array, scale: float) -> jax.Array:
        return jax.shard_map(
            functools.partial(local_attention, scale=scale),
            mesh=mesh,
            in_specs=P(AXES),
            out_specs=P(AXES),
            check_vma=False,
        )(q, kv, k_rope)

    def look_up_own(table: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
        return jax.shard_map(
            functools.partial(look_up, dtype=dtype),
            mesh=mesh,
            in_specs=(P(), P(AXES)),
            out_specs=P(AXES),
            check_vma=False,
        )(table, tokens)

    return Placement(
        experts=experts,
        attention=attention,
        look_up=look_up_own,
        gather=gather,
        spread=lambda x: jax.lax.with_sharding_constraint(x, spread),
    )
