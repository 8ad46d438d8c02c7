"""Loads as measured: of experts over the last steps, and of the GPUs that a plan puts them on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num


class LoadWindow:
    """Tokens sent to each expert in the last `steps` steps, on the host."""

    def __init__(self, layers: int, experts: int, steps: int):
        """Raises ValueError for a size below 1."""
        for name, size in {"layers": layers, "experts": experts, "steps": steps}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: at least 1")
        self._loads = np.zeros((steps, layers, experts), np.int64)
        self._added = 0

    def add(self, load_LE: Int[np.ndarray, "l e"]) -> None:
        """Append a step, summed over all devices; the oldest leaves a full window.

        Raises ValueError unless it is counts of tokens [l, e].
        """
        load, shape = np.asarray(load_LE), self._loads.shape[1:]
        if load.shape != shape:
            raise ValueError(f"load_LE is {load.shape}: expected [layers, experts], {shape}")
        if not np.issubdtype(load.dtype, np.integer) or load.min() < 0:
            raise ValueError(
                f"load_LE is {load.dtype}, its least {load.min()}: expected integers, 0 or more"
            )
        self._loads[self._added % len(self._loads)] = load
        self._added += 1

    def total(self) -> Int[np.ndarray, "l e"]:
        """Sums over the steps in the window, which may be fewer than it holds."""
        return self._loads.sum(axis=0)


def gpu_loads(
    weight_LE: Num[np.ndarray, "l e"],
    physical_to_logical: Int[np.ndarray, "l replicas"],
    logical_count: Int[np.ndarray, "l e"],
    num_gpus: int,
) -> Float[np.ndarray, "l gpus"]:
    """The load of every GPU, where an expert's load is divided evenly among its replicas.

    Raises ValueError on shapes that do not fit and places that cannot be divided among the GPUs.
    """
    weight, count = np.asarray(weight_LE, np.float64), np.asarray(logical_count)
    order = np.asarray(physical_to_logical)
    if weight.ndim != 2 or weight.shape != count.shape or order.shape[:-1] != weight.shape[:1]:
        raise ValueError(
            f"weight_LE is {weight.shape}, physical_to_logical {order.shape}, logical_count "
            f"{count.shape}: expected [l, e], [l, replicas], [l, e]"
        )
    layers, replicas = order.shape
    if num_gpus < 1 or replicas % num_gpus:
        raise ValueError(f"num_gpus is {num_gpus}: it does not divide {replicas} replicas")
    by_place = np.take_along_axis(weight / count, order, axis=1)
    return by_place.reshape(layers, num_gpus, -1).sum(axis=-1)


def imbalance(loads_LG: Num[np.ndarray, "l gpus"]) -> Float[np.ndarray, " l"]:
    """The heaviest load of each layer in means: 1 is even, and so is a layer without any load.

    An expert-parallel step waits for the heaviest GPU. Raises ValueError unless [l, gpus].
    """
    loads = np.asarray(loads_LG, np.float64)
    if loads.ndim != 2 or not loads.shape[1]:
        raise ValueError(f"loads_LG is {loads.shape}: expected [layers, gpus]")
    mean = loads.mean(axis=1)
    return np.divide(loads.max(axis=1), mean, out=np.ones(len(loads)), where=mean > 0)
