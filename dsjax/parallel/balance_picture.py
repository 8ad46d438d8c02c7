"""The picture of a rebalancing: how evenly GPUs were loaded before it, and are after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from dsjax.parallel.loads import imbalance

if TYPE_CHECKING:
    from jaxtyping import Num

BEFORE, AFTER = "tab:red", "tab:blue"


def draw_balance(
    loads_before: Num[np.ndarray, "l gpus"], loads_after: Num[np.ndarray, "l gpus"], path: Path
) -> Path:
    """Above each layer's heaviest GPU before and after; below all GPUs of the worst layer before.

    Loads are shown in means of their layer. Raises ValueError unless both are [l, gpus].
    """
    before, after = np.asarray(loads_before, float), np.asarray(loads_after, float)
    if before.shape != after.shape or before.ndim != 2 or not before.size:
        raise ValueError(
            f"loads_before is {before.shape}, loads_after {after.shape}: expected twice "
            "[layers, gpus]"
        )
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 7), layout="constrained")
    _layers(above, imbalance(before), imbalance(after))
    worst = int(imbalance(before).argmax())
    _gpus(below, _in_means(before[worst]), _in_means(after[worst]), worst)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _layers(axes: plt.Axes, before: np.ndarray, after: np.ndarray) -> None:
    for name, values, color in (("before", before, BEFORE), ("after", after, AFTER)):
        label = f"{name}: mean {values.mean():.2f}, worst {values.max():.2f}"
        axes.plot(values, "o-", markersize=4, linewidth=1.2, color=color, label=label)
    axes.set(xlabel="MoE layer", title="Heaviest GPU of each layer", xlim=(-0.5, len(before) - 0.5))
    _finish(axes, max(before.max(), after.max()))


def _gpus(axes: plt.Axes, before: np.ndarray, after: np.ndarray, layer: int) -> None:
    edges = np.arange(len(before) + 1) - 0.5
    axes.stairs(before, edges, fill=True, color=BEFORE, alpha=0.5, label="before")
    axes.stairs(after, edges, baseline=None, color=AFTER, linewidth=2, label="after")
    title = f"All GPUs of layer {layer}, the worst before"
    axes.set(xlabel="GPU", title=title, xlim=(edges[0], edges[-1]))
    _finish(axes, max(before.max(), after.max()))


def _finish(axes: plt.Axes, heaviest: float) -> None:
    axes.axhline(1, color="black", linewidth=1)
    axes.set(ylabel="load, in means (1 is even)", ylim=(0, 1.25 * heaviest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.legend(loc="upper right", ncols=2)
    axes.grid(alpha=0.3, axis="y")


def _in_means(loads_G: np.ndarray) -> np.ndarray:
    mean = loads_G.mean()
    return loads_G / mean if mean > 0 else np.ones_like(loads_G)
