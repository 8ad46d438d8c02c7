"""What a training step's memory on one device is for.

What the program is given is exact, by the shapes of its arrays and how they are divided over the
devices: parameters, moments, the rest of the state, the batch. So are the bytes of all gradients,
one for each parameter: clipping by their norm needs all of them at once. XLA places them among its
temporaries, whose size is its own plan, as are those of the results (metrics) and of the program;
"activations and workspace" is what the plan has beyond the gradients, the second set of them of
gradient accumulation included. The plan leaves out what the allocator rounds up and keeps. The peak
is measured, where the platform tells: all that the process ever had at once, compilation's trials
of kernels included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from dsjax.train.peak import peak_memory_bytes

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from dsjax.train.step import TrainState

SHAPES, PLAN, MEASURED = "exact, by shapes", "XLA's plan", "measured"
MOMENTS = ("mu", "nu")


@dataclass(frozen=True)
class Memory:
    """Bytes on one device; None for what the platform does not tell."""

    parameters: int
    """The float32 masters."""
    moments: int
    other_state: int
    """Counts, router biases, and whatever else the state keeps."""
    batch: int
    gradients: int
    workspace: int | None
    """XLA's temporaries less the gradients: activations and scratch."""
    results: int | None
    """What the step returns beside the state, which takes the old one's place."""
    code: int | None
    peak: int | None

    @property
    def planned(self) -> int | None:
        """All but the measured peak."""
        parts = (self.parameters, self.moments, self.other_state, self.batch, self.gradients,
                 self.workspace, self.results, self.code)  # fmt: skip
        return None if None in parts else sum(part for part in parts if part is not None)

    def rows(self) -> list[tuple[str, int | None, str]]:
        """(what, bytes, how it is known) for people."""
        return [
            ("parameters, float32 masters", self.parameters, SHAPES),
            ("moments", self.moments, SHAPES),
            ("other state", self.other_state, SHAPES),
            ("batch", self.batch, SHAPES),
            ("gradients", self.gradients, f"{SHAPES}, within the plan"),
            ("activations and workspace", self.workspace, f"{PLAN}, less the gradients"),
            ("results", self.results, PLAN),
            ("program", self.code, PLAN),
            ("all of these", self.planned, PLAN),
            ("peak in use", self.peak, MEASURED),
        ]


def measure_memory(
    state: TrainState, batch: PyTree[jax.Array], compiled: jax.stages.Compiled
) -> Memory:
    """Memory of the step compiled for this state (shapes with shardings will do) and batch."""
    moments = sum(
        bytes_of(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if any(getattr(key, "name", None) in MOMENTS for key in path)
    )
    parameters = bytes_of(state.params)
    plan: Any = compiled.memory_analysis()
    return Memory(
        parameters=parameters,
        moments=moments,
        other_state=bytes_of(state) - parameters - moments,
        batch=bytes_of(batch),
        gradients=parameters,
        workspace=max(plan.temp_size_in_bytes - parameters, 0) if plan else None,
        results=plan.output_size_in_bytes - plan.alias_size_in_bytes if plan else None,
        code=plan.generated_code_size_in_bytes if plan else None,
        peak=peak_memory_bytes(),
    )


def readable(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.4g} {unit}"
    return f"{count} B"


def bytes_of(tree: PyTree[Any]) -> int:
    """Bytes of a tree's arrays, or shapes of arrays, on one device."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
