"""The device mesh: `data` replicates parameters, `fsdp` also divides them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from dsjax.config import Mesh

AXES = ("data", "fsdp")


def build_mesh(config: Mesh, devices: int | None = None) -> jax.sharding.Mesh:
    """The mesh a run asks for, over all devices or the first `devices` of them.

    Raises ValueError when the axes do not multiply up to the devices there are.
    """
    count = jax.device_count() if devices is None else devices
    shape = [config.data, config.fsdp]
    if -1 in shape:
        known = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count:
        raise ValueError(
            f"mesh data={config.data}, fsdp={config.fsdp} does not make up {count} devices: "
            "the axes must multiply to that number (-1 takes what is left)"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(shape), AXES, axis_types=kinds, devices=jax.devices()[:count])
