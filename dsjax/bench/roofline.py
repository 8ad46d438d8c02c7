"""The roofline picture of a GEMM benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dsjax.bench.ceilings import Ceilings
from dsjax.bench.shapes import KINDS, Kind, Shape, work

PNG = "roofline.png"
STYLES: dict[Kind, tuple[str, str]] = {
    "dense": ("o", "tab:blue"),
    "grouped": ("s", "tab:orange"),
    "masked": ("D", "tab:green"),
    "wgrad": ("^", "tab:red"),
    "bf16": ("v", "tab:purple"),
}
Numbered = dict[int, dict[str, Any]]


def draw(
    folder: Path, found: Sequence[dict[str, Any]], ceilings: Ceilings, device: str
) -> Path | None:
    """Write roofline.png: rate against arithmetic intensity, the compute-bound end once more on its
    own, and a key to the numbers. None where nothing was timed.
    """
    timed = {number: record for number, record in enumerate(found, 1) if "us" in record}
    if not timed:
        return None
    bend = ceilings.fp8 / ceilings.bandwidth
    end = {number: r for number, r in timed.items() if r["intensity"] > bend / 2}
    figure, axes = plt.subplots(1, 3, figsize=(16, 7), width_ratios=(4, 4, 2))
    _panel(axes[0], timed, ceilings, "All")
    _numbers(axes[0], {number: r for number, r in timed.items() if number not in end})
    axes[0].legend(loc="lower right", fontsize=9)
    if end:
        _panel(axes[1], end, ceilings, "The compute-bound end")
        _numbers(axes[1], end)
    else:
        axes[1].axis("off")
    _key(axes[2], timed)
    figure.suptitle(f"GEMM on {device}, against ceilings of the same run")
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PNG
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _panel(axes: plt.Axes, timed: Numbered, ceilings: Ceilings, title: str) -> None:
    _ceilings(axes, timed, ceilings)
    _xla(axes, timed)
    _ours(axes, timed)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP a byte of operands and output",
        ylabel="TFLOP/s", title=title,
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:g}")
    axes.tick_params(which="minor", labelsize=6)
    axes.grid(alpha=0.3, which="both")


def _ceilings(axes: plt.Axes, timed: Numbered, ceilings: Ceilings) -> None:
    intensities = [record["intensity"] for record in timed.values()]
    low, high = min(intensities) / 2.5, max(intensities) * 1.5
    for name, peak, style in (("FP8", ceilings.fp8, "-"), ("BF16", ceilings.bf16, "--")):
        bend = min(max(peak / ceilings.bandwidth, low), high)
        x = np.array([low, bend, high])
        y = np.minimum(peak, x * ceilings.bandwidth) / 1e12
        label = f"{name} {peak / 1e12:.4g} TFLOP/s, copy {ceilings.bandwidth / 1e9:.4g} GB/s"
        axes.plot(x, y, f"k{style}", linewidth=1, label=label)


def _xla(axes: plt.Axes, timed: Numbered) -> None:
    for name, label, color in (
        ("xla_fp8_us", "XLA FP8", "black"),
        ("xla_bf16_us", "XLA BF16", "tab:gray"),
    ):
        points = [_point(record, name) for record in timed.values() if record[name]]
        if points:
            axes.scatter(*zip(*points, strict=True), marker="x", s=30, color=color, label=label)


def _point(record: dict, name: str) -> tuple[float, float]:
    """XLA's point has the intensity of its own operands: BF16 is more bytes than FP8."""
    bf16 = work("bf16", Shape.parse(record["shape"])).intensity
    intensity = bf16 if name == "xla_bf16_us" else record["intensity"]
    return intensity, record["flops"] / record[name] / 1e6


def _ours(axes: plt.Axes, timed: Numbered) -> None:
    for kind in KINDS:
        points = [(r["intensity"], r["tflops"]) for r in timed.values() if r["kind"] == kind]
        if points:
            marker, color = STYLES[kind]
            axes.scatter(*zip(*points, strict=True), marker=marker, color=color, s=36, label=kind)


def _numbers(axes: plt.Axes, timed: Numbered) -> None:
    for number, record in timed.items():
        axes.annotate(
            str(number), (record["intensity"], record["tflops"]), fontsize=7,
            xytext=(4, 4 if number % 2 else -9), textcoords="offset points",
        )  # fmt: skip


def _key(axes: plt.Axes, timed: Numbered) -> None:
    lines = [f"{n:2}  {r['kind']} {r['shape']}" for n, r in timed.items()]
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=8, family="monospace")
