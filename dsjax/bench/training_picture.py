"""The picture of a training benchmark: shares of the ceilings, ours and XLA's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PNG = "training.png"
HEIGHT = 0.4  # of a bar, in rows


def draw(folder: Path, found: Sequence[dict[str, Any]], device: str) -> Path | None:
    """Write training.png: two bars a row, XLA's missing where it failed. None where nothing was
    timed."""
    timed = [record for record in found if "us" in record]
    if not timed:
        return None
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.36 * len(timed)), layout="constrained")
    _bars(axes, [r["share_of_ceiling"] for r in timed], -HEIGHT / 2, "ours", "tab:blue")
    _bars(axes, [r["xla_share_of_ceiling"] for r in timed], HEIGHT / 2, "XLA", "tab:gray")
    names = [f"{record['kind']} {record['shape']}" for record in timed]
    axes.set_yticks(range(len(timed)), names, fontsize=8)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, max(112, axes.get_xlim()[1]))
    axes.set_xlabel("percent of the ceiling: the same run's copy, for the head its BF16 matmul")
    axes.grid(alpha=0.3, axis="x")
    axes.set_title(f"Beside GEMMs and attention, on {device}")
    figure.legend(loc="outside lower center", ncols=2)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PNG
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bars(
    axes: plt.Axes, shares: Sequence[float | None], offset: float, label: str, color: str
) -> None:
    places = [place + offset for place in range(len(shares))]
    percent = [math.nan if share is None else 100 * share for share in shares]
    bars = axes.barh(places, percent, height=HEIGHT, color=color, label=label)
    texts = ["" if math.isnan(each) else f"{each:.0f}" for each in percent]
    axes.bar_label(bars, texts, fontsize=7, padding=2)
