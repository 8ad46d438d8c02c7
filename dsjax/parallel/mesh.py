"""The device mesh: what each axis divides is told by `dsjax.config.Mesh`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from dsjax.config import Mesh

Axes = tuple[str, ...]

AXES: Axes = ("data", "fsdp", "host", "expert")
EXPERTS: Axes = ("host", "expert")
"""Axes that divide the experts."""
FSDP: Axes = ("fsdp",)
"""Those that divide their weights further."""
STATE: Axes = (*FSDP, *EXPERTS)
"""Axes that divide the rest of the state."""


def build_mesh(config: Mesh, devices: int | None = None) -> jax.sharding.Mesh:
    """The mesh a run asks for, over all devices or the first `devices` of them.

    Raises ValueError when the axes do not multiply up to the devices there are.
    """
    count = jax.device_count() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        asked = ", ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise ValueError(
            f"mesh {asked} does not make up {count} devices: the axes must multiply to that number "
            "(-1 takes what is left)"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=kinds, devices=jax.devices()[:count])
