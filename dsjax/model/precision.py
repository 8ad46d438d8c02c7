"""What is computed in which format.

Norms, the router, softmax, rotary angles and the loss are always float32. Everything that is a
matrix product goes through `project`, the one door at which a format is chosen.

FP8 is DeepSeek-V3's recipe (report, section 3.3): all three products of every linear layer and
expert in e4m3, inputs and gradients with a scale for 1 x 128, weights for 128 x 128, the input
behind attention with powers of two for scales. V3 keeps that input in E5M6; ours stays e4m3. V3's
weight gradients are float32; ours leave their product in BF16, as without FP8, and are summed over
micro-batches in float32. Weights are cast once a step, `fp8_values`, and meet their masters in
`with_fp8`; those of which a device has a part (ZeRO-3) are an `Fp8Master` until a layer has brought
the parts together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from dsjax.model.float32 import exactness
from pallas_kernels import fp8_gauge
from pallas_kernels.fp8_layers import fp8_project
from pallas_kernels.fp8_recipe import V3, Recipe
from pallas_kernels.fp8_weight import Fp8Weight, quantize_weight
from pallas_kernels.quantize import TILE

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PyTree

    from dsjax.config import Precision

    Weight = Float[Array, "..."] | Fp8Weight

COMPUTE_DTYPE = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp8": jnp.bfloat16}

STACKED = ("dense", "moe")
"""Parts of a model whose parameters have a leading layer axis."""

FP8_WIDTH = 16  # bytes: TMA's unit
MOST_ADDED = 1 / 16
"""Zeros that a SwiGLU may be widened by, of its width."""
FP8_RANKS = {
    "q": (3, 1), "q_down": (2, 1), "q_up": (3, 1), "kv_down": (2, 1), "kv_up": (3, 1),
    "out": (3, 2), "gate_up": (2, 1), "down": (2, 1), "project": (2, 1),
}  # fmt: skip
"""Weights multiplied in FP8: axes of one of them, and how many of these are inputs. Layers and
experts number them in front. All others (embedding, head, router, norms) stay as they are."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "gauge"],
    meta_fields=["name", "recipe"],
)
@dataclasses.dataclass(frozen=True)
class Fp8Master:
    """A weight that is multiplied in FP8, before it is cast."""

    master: Float[Array, "..."]
    """A device's part of it."""
    gauge: Float[Array, " 3"]
    name: str
    recipe: Recipe

    def cast(self, master: Float[Array, "..."]) -> Fp8Weight:
        """Of all its parts, of one layer. ValueError where its widths do not fit."""
        values = _cast(self.name, master)
        return Fp8Weight(_in_whole_tiles(self.name, master), self.gauge, *values, self.recipe)


def compute_dtype(precision: Precision) -> jnp.dtype:
    """The dtype of activations; raises ValueError for a precision that does not exist."""
    if precision not in COMPUTE_DTYPE:
        raise ValueError(f"precision is {precision!r}: use one of {', '.join(COMPUTE_DTYPE)}")
    return jnp.dtype(COMPUTE_DTYPE[precision])


def _name(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "key", ""))


def fp8_values(params: PyTree[Array]) -> PyTree:
    """e4m3 values and scales of the weights that are multiplied in FP8, None for the others.

    params: a model's parameters as nested dicts. ValueError for a weight that is no multiple of 16
    wide in and out.
    """

    def cast(path: tuple, master: jax.Array) -> tuple[jax.Array, ...] | None:
        if _name(path) not in FP8_RANKS:
            return None
        return _cast(_name(path), master, jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(cast, params)


def _cast(name: str, master: jax.Array, called: str = "") -> tuple[jax.Array, ...]:
    axes, inputs = FP8_RANKS[name]
    groups = master.ndim - axes
    _check_widths(called or name, master.shape[groups:], inputs)
    return quantize_weight(_in_whole_tiles(name, master), groups, inputs)


def _check_widths(name: str, shape: tuple[int, ...], inputs: int) -> None:
    widths = math.prod(shape[:inputs]), math.prod(shape[inputs:])
    if any(width % FP8_WIDTH for width in widths):
        raise ValueError(
            f"{name} is {widths[0]} wide in and {widths[1]} out: precision fp8 takes multiples of "
            f"{FP8_WIDTH}"
        )


def fp8_gauges(params: PyTree[Array]) -> PyTree:
    """A gauge (see `pallas_kernels.fp8_gauge`) for every layer's FP8 weights, None for others."""

    def make(path: tuple, master: jax.Array) -> jax.Array | None:
        stacked = getattr(path[0], "key", "") in STACKED
        found = _name(path) in FP8_RANKS
        return fp8_gauge.new_gauge(*master.shape[:stacked]) if found else None

    return jax.tree_util.tree_map_with_path(make, params)


def with_fp8(
    params: PyTree[Array], gauges: PyTree, values: PyTree | None, recipe: Recipe = V3
) -> PyTree:
    """Parameters in which those that have FP8 values are `Fp8Weight`s.

    Without values those that would have them are `Fp8Master`s.
    """

    def join(path: tuple, master: jax.Array, gauge: Any, cast: tuple | None) -> Any:
        if gauge is None:
            return master
        if cast is None:
            return Fp8Master(master, gauge, _name(path), recipe)
        return Fp8Weight(_in_whole_tiles(_name(path), master), gauge, *cast, recipe)

    if values is None:
        values = jax.tree.map(lambda x: None, params)
    return jax.tree_util.tree_map_with_path(
        join, params, gauges, values, is_leaf=lambda x: x is None
    )


def _in_whole_tiles(name: str, master: jax.Array) -> jax.Array:
    """With zeros up to whole tiles of SwiGLU's width, where they are few.

    SwiGLU's kernels take no others, and V2-Lite's dense layer is 10944 = 85.5 * 128 wide.
    """
    last = [(0, 0)] * (master.ndim - 2)
    if name not in ("gate_up", "down"):
        return master
    width = master.shape[-1] // 2 if name == "gate_up" else master.shape[-2]
    missing = -width % TILE
    if missing > width * MOST_ADDED:
        return master
    if name == "down":
        return jnp.pad(master, [*last, (0, missing), (0, 0)])
    halves = master.reshape(*master.shape[:-1], 2, width)
    padded = jnp.pad(halves, [*last, (0, 0), (0, 0), (0, missing)])
    return padded.reshape(*master.shape[:-1], -1)


def plain(weight: Weight, dtype: jnp.dtype) -> Float[Array, "..."]:
    """A weight that has not been cast to FP8, in that format; ValueError for one that has."""
    if isinstance(weight, Fp8Weight):
        raise ValueError(
            f"a weight {weight.master.shape} is FP8 and meets one that is not, or an equation that "
            "FP8 products do not have"
        )
    return weight.astype(dtype)


def project(
    equation: str, x: Float[Array, ...], w: Weight, *, power_of_two: bool = False
) -> Float[Array, ...]:
    """`einsum(equation, x, w)` in x's format, or in FP8 where the weight has been cast to it.

    power_of_two: of an FP8 product's input, so are its scales.
    """
    return project_all((equation,), x, (w,), power_of_two=power_of_two)[0]


def project_all(
    equations: tuple[str, ...],
    x: Float[Array, ...],
    weights: tuple[Weight, ...],
    *,
    power_of_two: bool = False,
) -> tuple[Float[Array, ...], ...]:
    """`project` of one x with several weights, for which it is cast once."""
    cast = tuple(w for w in weights if isinstance(w, Fp8Weight))
    if not cast:
        return tuple(
            jnp.einsum(equation, x, plain(w, x.dtype), precision=exactness(x.dtype))
            for equation, w in zip(equations, weights, strict=True)
        )
    inputs = [_summed_axes(equation) for equation in equations]
    kept = x.ndim - inputs[0]
    rows = x.reshape(-1, math.prod(x.shape[kept:]))
    found = fp8_project(rows, cast, power_of_two=power_of_two)
    return tuple(
        y.reshape(*x.shape[:kept], *w.master.shape[axes:])
        for y, w, axes in zip(found, cast, inputs, strict=True)
    )


def _summed_axes(equation: str) -> int:
    """How many letters of the weight, which begins with them, are summed over."""
    operands, out = equation.split("->")
    return len(set(operands.split(",")[1]) - set(out))
