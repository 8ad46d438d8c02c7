"""Pictures of an attention benchmark: ratios to recorded FlashMLA, and shares of the ceilings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from dsjax.bench.mla_shapes import Shape

Record = dict[str, Any]
Panels = dict[str, list[Record]]
RATIOS, SHARES = "flashmla.png", "ceilings.png"
COLUMNS = 2
COPY, BF16 = "tab:blue", "tab:orange"


def draw(folder: Path, found: Sequence[Record], device: str) -> list[Path]:
    """Write flashmla.png, if rows have a recorded time, and ceilings.png, if any was timed."""
    timed = [record for record in found if "us" in record]
    recorded = [record for record in timed if record["times_flashmla"]]
    written = []
    if recorded:
        title = f"FlashMLA, as recorded on an H200, over ours on {device}: above 1 ours is faster"
        picture = _panels(_by(recorded), lambda records: 3.4, _ratios, sharey=True)
        written.append(_save(picture, folder / RATIOS, title))
    if timed:
        title = f"Attention on {device}: share of what the same run's copy and matmul reach"
        picture = _panels(_by(timed), lambda records: 0.9 + 0.21 * len(records), _shares)
        handles, labels = picture.axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=2)
        written.append(_save(picture, folder / SHARES, title))
    return written


def _by(found: Sequence[Record]) -> Panels:
    panels: Panels = {}
    for record in found:
        panels.setdefault(_panel(record), []).append(record)
    return panels


def _panel(record: Record) -> str:
    """Decode by heads and queries, which set how hard it is on the tensor cores; else the part."""
    shape = Shape.parse(record["shape"])
    if record["kind"] == "decode":
        return f"decode, {shape.h} heads, {shape.s} " + ("query" if shape.s == 1 else "queries")
    return "prefill" if shape.form == "prefill" else record["kind"]


def _panels(
    panels: Panels,
    inches: Callable[[list[Record]], float],
    fill: Callable[[plt.Axes, list[Record]], None],
    *,
    sharey: bool = False,
) -> Figure:
    """A grid of panels, each row of it as high as its highest panel."""
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    each = [inches(records) for records in panels.values()]
    heights = [max(each[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(6.5 * columns, 9.0), sum(heights) + 1.0), squeeze=False,
        height_ratios=heights, layout="constrained", sharey=sharey,
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (name, records) in zip(grid.flat, panels.items(), strict=False):
        axes.set_title(name, fontsize=11)
        fill(axes, records)
    return figure


def _save(figure: Figure, path: Path, title: str) -> Path:
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _ratios(axes: plt.Axes, records: list[Record]) -> None:
    """Dense decode over the length, a line a batch; sparse over the batch."""
    lines: dict[str, list[tuple[int, float]]] = {}
    sparse = False
    for record in records:
        shape, ratio = Shape.parse(record["shape"]), record["times_flashmla"]
        sparse = shape.form == "sparse"
        name = f"{shape.h} heads, s {shape.s}" if sparse else f"batch {shape.b}"
        lines.setdefault(name, []).append((shape.b if sparse else shape.t, ratio))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="requests" if sparse else "tokens in the cache of a request")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _shares(axes: plt.Axes, records: list[Record]) -> None:
    """Two bars a row; the longer one says what bounds it."""
    names = [_name(record) for record in records]
    for offset, field, label, color in (
        (-0.2, "share_of_copy", "of the copy's GB/s", COPY),
        (0.2, "share_of_bf16", "of the BF16 matmul's TFLOP/s", BF16),
    ):
        places = [place + offset for place in range(len(records))]
        shares = [100 * record[field] for record in records]
        axes.barh(places, shares, height=0.4, color=color, label=label)
    for place, record in enumerate(records):
        most = 100 * max(record["share_of_copy"], record["share_of_bf16"])
        axes.annotate(f"{most:.0f}", (most, place), fontsize=7, va="center", xytext=(2, 0),
                      textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(records)), names, fontsize=7)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, max(112, axes.get_xlim()[1]))
    axes.set_xlabel("percent")
    axes.grid(alpha=0.3, axis="x")


def _name(record: Record) -> str:
    shape = Shape.parse(record["shape"])
    if record["kind"] == "decode":
        return f"b{shape.b} t{shape.t}"
    return f"{record['kind']} {shape}" if shape.form == "prefill" else str(shape)
