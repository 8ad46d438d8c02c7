"""The picture of a profile: where a step's time goes, and its memory."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jax
import matplotlib.pyplot as plt

from dsjax.train.memory import MEASURED, PLAN, SHAPES, Memory, readable
from dsjax.train.profile import Profile

WORKS, IDLE = "tab:blue", "tab:gray"
KNOWN = {SHAPES: "tab:blue", PLAN: "tab:orange", MEASURED: "tab:green"}
Bars = list[tuple[str, float, str, str]]
"""What, how much, the figure at its end, colour."""


def draw(found: Profile, path: Path) -> Path:
    """Write the picture; the time only if the profile shows it."""
    panels = [("memory of one device, GiB", _memory(found.memory))]
    if found.timeline.operations:
        panels.insert(0, ("ms of a traced step", _times(found)))
    heights = [1.1 + 0.27 * len(bars) for _, bars in panels]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 0.5), squeeze=False, height_ratios=heights,
        layout="constrained",
    )  # fmt: skip
    for axes, (label, bars) in zip(grid.flat, panels, strict=True):
        _bars(axes, label, bars)
    figure.suptitle(
        f"{found.run.name} on {jax.device_count()} x {jax.devices()[0].device_kind}: "
        f"{found.tokens_per_second:,.0f} tokens/s"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _times(found: Profile) -> Bars:
    bars: Bars = []
    for row in found.kinds:
        note = f"{row.share:.1%}"
        if row.rate:
            note += f", {row.rate / 1e12:.3g} TFLOP/s"
        if row.share_of_peak:
            note += f", {row.share_of_peak:.0%} of peak"
        bars.append((row.kind, row.seconds * 1e3, note, WORKS))
    idle = found.timeline.seconds - found.timeline.busy
    return [*bars, ("nothing runs", idle * 1e3, f"{idle / found.timeline.seconds:.1%}", IDLE)]


def _memory(memory: Memory) -> Bars:
    return [
        (what, count / 2**30, f"{readable(count)}, {source}", KNOWN[_known(source)])
        for what, count, source in memory.rows()
        if count is not None
    ]


def _known(source: str) -> str:
    return next(known for known in KNOWN if source.startswith(known))


def _bars(axes: plt.Axes, label: str, bars: Bars) -> None:
    names, amounts, notes, colours = zip(*bars, strict=True)
    axes.barh(range(len(bars)), amounts, height=0.7, color=colours)
    for place, (amount, note) in enumerate(zip(amounts, notes, strict=True)):
        axes.annotate(note, (amount, place), fontsize=8, va="center", xytext=(3, 0),
                      textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(bars)), names, fontsize=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.5 * max(amounts))
    axes.set_xlabel(label)
    axes.grid(alpha=0.3, axis="x")
