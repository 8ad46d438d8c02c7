"""The scales of an FP8 checkpoint, kept beside the model so that saving gives the same bits.

They are stacked like the weights they belong to: 45,000 small arrays become a few dozen.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.hf.fp8 import scale_shape
from dsjax.hf.names import Row

NOT_FP8 = -1.0
"""Stands where a weight of a stack was not quantised."""


class BlockScale(nnx.Variable):
    """Scales [*stack, out/128, in/128]: no parameter, and nothing the model computes with."""


class Scales:
    """Collects scales while a checkpoint is read."""

    def __init__(self) -> None:
        self._stacks: dict[str, np.ndarray] = {}

    def add(self, row: Row, leaf: tuple[int, ...], scales: np.ndarray) -> None:
        shape = leaf[: len(row.index)] + scale_shape(row.shape(leaf))
        stack = self._stacks.setdefault(key(row), np.full(shape, NOT_FP8, np.float32))
        stack[row.index] = scales

    def __bool__(self) -> bool:
        return bool(self._stacks)

    def variables(self) -> nnx.Dict:
        return nnx.Dict({name: BlockScale(jnp.asarray(a)) for name, a in self._stacks.items()})


class StoredScales:
    """The scales a model carries, if any, on the host."""

    def __init__(self, model: nnx.Module) -> None:
        found = getattr(model, "fp8_scales", {})
        self._stacks = {name: np.asarray(found[name][...]) for name in found}

    def __bool__(self) -> bool:
        return bool(self._stacks)

    def get(self, row: Row) -> np.ndarray | None:
        """The scales of one weight; None if it was not quantised."""
        stack = self._stacks.get(key(row))
        if stack is None or stack[row.index].flat[0] == NOT_FP8:
            return None
        return stack[row.index]

    def power_of_two(self) -> bool:
        """Whether all are powers of two, as in V3.1 (`scale_fmt` ue8m0)."""
        real = [stack[stack != NOT_FP8] for stack in self._stacks.values()]
        return bool(real) and all(bool((np.frexp(scales)[0] == 0.5).all()) for scales in real)


def key(row: Row) -> str:
    """Names a stack: the path of the weight, and its half for gate and up."""
    return "/".join(map(str, (*row.path, row.part) if row.part else row.path))
