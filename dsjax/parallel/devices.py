"""The devices of a run as its step sees them: one alone, or those of a mesh under shard_map."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsjax.model import LOCAL, Placement
from dsjax.parallel.mesh import AXES
from dsjax.parallel.sharding import Gather, divisions
from pallas_kernels.token_order import HERE, Exchange

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from dsjax.config import Zero

BATCH, MICRO_BATCHES, SAME = P(AXES), P(None, AXES), P()


class Alone:
    """One device, which has everything."""

    placement: Placement = LOCAL
    params: Any = SAME
    """How parameters and their gradients lie, as a spec of `on_each`."""

    def on_each(self, function: Callable, takes: tuple, gives: Any) -> Callable:
        """The function of one device's arrays as one of all; specs say how these lie."""
        return function

    def together(self, params: PyTree) -> PyTree:
        """What a step begins with: whole parameters, but for those of other devices' experts,
        unless layers bring their own together."""
        return params

    def after_micro_batch(self, grads: PyTree) -> PyTree:
        return grads

    def after_all(self, grads: PyTree) -> PyTree:
        """Sums over the devices, divided as the parameters are."""
        return grads

    def total(self, tree: PyTree) -> PyTree:
        """Sums over the devices."""
        return tree


ALONE = Alone()


class Meshed(Alone):
    """The devices of a mesh: each has its own sequences and its part of the state."""

    def __init__(
        self, mesh: Mesh, params: PyTree[jax.ShapeDtypeStruct], exchange: Exchange = HERE,
        zero: Zero = 3,
    ):  # fmt: skip
        self.mesh, self.zero = mesh, zero
        self.divisions = divisions(params, mesh)
        self.params = jax.tree.map(lambda one: one.spec, self.divisions)
        by_layer = {"gather": Gather(params, mesh)} if zero == 3 else {}
        self.placement = Placement(mesh.size, exchange, total=self.total, **by_layer)

    def on_each(self, function: Callable, takes: tuple, gives: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=False
        )

    def together(self, params: PyTree) -> PyTree:
        if self.zero == 3:
            return params
        return jax.tree.map(lambda one, x: one.gather(x), self.divisions, params)

    def after_micro_batch(self, grads: PyTree) -> PyTree:
        return self._scatter(grads) if self.zero == 2 else grads

    def after_all(self, grads: PyTree) -> PyTree:
        grads = self._scatter(grads) if self.zero == 1 else grads
        return jax.tree.map(lambda one, grad: one.complete(grad), self.divisions, grads)

    def total(self, tree: PyTree) -> PyTree:
        return jax.lax.psum(tree, AXES)

    def _scatter(self, grads: PyTree) -> PyTree:
        return jax.tree.map(lambda one, grad: one.scatter(grad), self.divisions, grads)
