"""The picture of an exchange benchmark: GB/s of ours and XLA's, and the ceilings of the links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PNG = "exchange.png"
HEIGHT = 0.27  # of a bar, in rows
BARS = [("us", "ours", "tab:blue"), ("dense_us", "all_to_all", "tab:gray"),
        ("ragged_us", "ragged_all_to_all", "tab:orange")]  # fmt: skip
LINES = {"loads": "solid", "stores": "dashed"}


def draw(
    folder: Path, found: Sequence[dict[str, Any]], ceilings: dict[str, float], device: str
) -> Path | None:
    """Write exchange.png: three bars a row that has peers. None where no such row was timed.

    `ceilings` are bytes/s of links by direction; bars of what was not timed are missing.
    """
    timed = [record for record in found if record.get("dense_us") or record.get("ragged_us")]
    if not timed:
        return None
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.6 * len(timed)), layout="constrained")
    for i, (key, label, color) in enumerate(BARS):
        _bars(axes, timed, key, (i - 1) * HEIGHT, label, color)
    for direction, rate in ceilings.items():
        axes.axvline(rate / 1e9, color="black", linewidth=1, linestyle=LINES[direction],
                     label=f"bulk {direction} over the links")  # fmt: skip
    names = [f"{record['kind']}\n{record['shape']}" for record in timed]
    axes.set_yticks(range(len(timed)), names, fontsize=8)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.set_xlabel("GB/s a device of rows that cross; beside the bars us a call")
    axes.grid(alpha=0.3, axis="x")
    axes.set_title(f"Exchange of experts' tokens, on {device}")
    figure.legend(loc="outside lower center", ncols=5)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PNG
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bars(
    axes: plt.Axes, timed: Sequence[dict[str, Any]], key: str, offset: float, label: str, color: str
) -> None:
    times = [record[key] or math.nan for record in timed]
    rates = [record["bytes"] / us / 1e3 for record, us in zip(timed, times, strict=True)]
    places = [place + offset for place in range(len(timed))]
    bars = axes.barh(places, rates, height=HEIGHT, color=color, label=label)
    texts = ["" if math.isnan(us) else f"{us:.0f}" for us in times]
    axes.bar_label(bars, texts, fontsize=7, padding=2)
