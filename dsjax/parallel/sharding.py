"""What lies where on a mesh, and how the parts of a state come together and apart.

Batches are divided over all axes. Of the state the experts are divided over `host` and `expert`,
and along another of their axes over `fsdp`; the rest is divided over all three. `data` repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.model.placement import GATHERED
from dsjax.model.precision import STACKED, Fp8Master
from dsjax.parallel.mesh import AXES, EXPERTS, FSDP, STATE, Axes

if TYPE_CHECKING:
    from jaxtyping import PyTree

SMALL = 1024
"""Arrays of fewer elements are replicated: dividing them saves nothing."""


Part = tuple[int, Axes]
"""An axis of an array and the mesh axes that divide it."""


@dataclass(frozen=True)
class Division:
    """How one array is divided."""

    experts: Part | None = None
    rest: Part | None = None
    """What layers bring together; experts stay where they are."""

    @property
    def spec(self) -> P:
        by_axis = dict(part for part in (self.experts, self.rest) if part)
        names = [by_axis.get(i, ()) for i in range(max(by_axis, default=-1) + 1)]
        return P(*[(*axes,) if len(axes) > 1 else axes[0] if axes else None for axes in names])

    def of_layer(self) -> Division:
        """That of one layer of a stack."""
        below = [part and (part[0] - 1, part[1]) for part in (self.experts, self.rest)]
        return Division(*below)

    def gather(self, x: jax.Array) -> jax.Array:
        if not self.rest:
            return x
        axis, names = self.rest
        return jax.lax.all_gather(x, names, axis=axis, tiled=True)

    def scatter(self, grad: jax.Array) -> jax.Array:
        """The sum over the devices of the gradient of what was gathered, divided again."""
        if not self.rest:
            return grad
        axis, names = self.rest
        return jax.lax.psum_scatter(grad, names, scatter_dimension=axis, tiled=True)

    def complete(self, grad: jax.Array) -> jax.Array:
        """The sum over the mesh axes that do not divide the array."""
        divided = {name for part in (self.experts, self.rest) if part for name in part[1]}
        return jax.lax.psum(grad, tuple(name for name in AXES if name not in divided))


def divide(shape: tuple[int, ...], sizes: dict[str, int], names: tuple[str, ...]) -> Division:
    """How an array with a path of these names is divided over mesh axes of these sizes.

    Raises ValueError for experts that do not divide evenly.
    """
    first, over, experts = int(not _is_apart(names)), STATE, None
    if "experts" in names:
        _check_experts(shape[first], sizes)
        experts, over = _part(first, EXPERTS, sizes), FSDP
        first += 1
    count = math.prod(sizes[axis] for axis in over)
    fitting = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0]
    if math.prod(shape) < SMALL or not fitting:
        return Division(experts)
    longest = max(fitting, key=lambda axis: shape[axis])
    return Division(experts, _part(longest, over, sizes))


def _part(axis: int, names: Axes, sizes: dict[str, int]) -> Part | None:
    divided = tuple(name for name in names if sizes[name] > 1)
    return (axis, divided) if divided else None


def _is_apart(names: tuple[str, ...]) -> bool:
    """Whether an array is no stack of layers, whose axis is never divided."""
    return set(names).isdisjoint(STACKED)


def _check_experts(experts: int, sizes: dict[str, int]) -> None:
    if experts % (sizes["host"] * sizes["expert"]):
        raise ValueError(
            f"{experts} experts do not divide over mesh host={sizes['host']}, "
            f"expert={sizes['expert']}"
        )


def path_names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)


def divisions(tree: PyTree[jax.ShapeDtypeStruct], mesh: Mesh) -> PyTree[Division]:
    """How every array of parameters, or of a train state, is divided: moments like parameters."""
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: divide(leaf.shape, sizes, path_names(path)), tree
    )


def state_shardings(state: PyTree[jax.ShapeDtypeStruct], mesh: Mesh) -> PyTree[NamedSharding]:
    """A sharding for every array of a train state."""
    return jax.tree.map(lambda one: NamedSharding(mesh, one.spec), divisions(state, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sequences spread over all devices."""
    return NamedSharding(mesh, P(AXES))


class Gather:
    """Brings together, inside of shard_map, a layer's weights or others that lie apart.

    Weights for FP8 are then cast.
    """

    def __init__(self, params: PyTree[jax.ShapeDtypeStruct], mesh: Mesh):
        leaves = jax.tree_util.tree_flatten_with_path(divisions(params, mesh))[0]
        self._divisions = {}
        for path, division in leaves:
            names = path_names(path)
            own = division if _is_apart(names) else division.of_layer()
            self._divisions[_without_numbers(names)] = own

    def __call__(self, kind: str, weights: Any) -> Any:
        def bring(path: tuple, x: jax.Array | Fp8Master) -> Any:
            names = (kind, *(name for name in path_names(path) if name not in ("", "value")))
            found, part = self._divisions.get(names), x.master if isinstance(x, Fp8Master) else x
            whole = checkpoint_name(found.gather(part), GATHERED) if found else part
            return x.cast(whole) if isinstance(x, Fp8Master) else whole

        def leaf(x: Any) -> bool:
            return isinstance(x, Fp8Master)

        return jax.tree_util.tree_map_with_path(bring, weights, is_leaf=leaf)


def _without_numbers(names: tuple[str, ...]) -> tuple[str, ...]:
    """MTP's depths are alike."""
    return tuple(name for name in names if not name.isdecimal())
