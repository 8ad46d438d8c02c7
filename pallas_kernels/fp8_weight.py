"""Weights of FP8 layers: a float32 or bfloat16 master beside its e4m3 values, cast once a step.

Both products that a weight enters want their summed axis contiguous, so the values are kept either
way round: 2 bytes a weight. Gradients go to the master; the values are constants.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax

from pallas_kernels.fp8_recipe import V3, Recipe
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.quantize import quantize_blocks_both

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "gauge", "q", "scale", "q_t"],
    meta_fields=["recipe"],
)
@dataclasses.dataclass(frozen=True)
class Fp8Weight:
    """A weight `x @ w` of K inputs and N outputs, or several along leading axes."""

    master: Float[Array, "..."]
    """Of any shape with as many elements; gradients have it."""
    gauge: Float[Array, "*layers 3"]
    """Zeros; their gradient is what `fp8_gauge` counts."""
    q: Float8e4m3fn[Array, "*groups k n"]
    scale: Float[Array, "*groups k_blocks n_blocks"]
    q_t: Float8e4m3fn[Array, "*groups n k"]
    recipe: Recipe = V3

    def __getitem__(self, index: object) -> Fp8Weight:
        """The weight itself for `weight[...]`, as modules read their arrays."""
        if index is not Ellipsis:
            raise ValueError(f"index is {index!r}: an Fp8Weight is read whole, as weight[...]")
        return self

    def cotangent(self, d_master: jax.Array, counts: jax.Array) -> Fp8Weight:
        """Gradients of master and gauge, none of the values."""
        nothing: Any = None
        return Fp8Weight(d_master, counts, nothing, nothing, nothing, self.recipe)

    @property
    def scale_t(self) -> Float[Array, "*groups n_blocks k_blocks"]:
        return self.scale.swapaxes(-1, -2)


def quantize_weight(
    master: Float[Array, "..."], groups: int, inputs: int, *, backend: Backend = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, scale, q_t) of an `Fp8Weight`: one scale for 128 x 128 (V3 report, section 3.3.2).

    The master's axes are `groups` leading ones, then `inputs` of inputs, then the outputs'. Raises
    ValueError on dtypes other than bfloat16 and float32, and where the axes do not suffice.
    """
    if not (groups >= 0 and 0 < inputs < master.ndim - groups):
        raise ValueError(
            f"groups is {groups}, inputs is {inputs}: master {master.shape} needs at least one "
            "axis of inputs and one of outputs behind its groups"
        )
    k = math.prod(master.shape[groups : groups + inputs])
    matrix = jax.lax.stop_gradient(master).reshape(*master.shape[:groups], k, -1)
    return quantize_blocks_both(matrix, backend=backend)
