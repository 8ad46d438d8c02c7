"""Pictures of a run, drawn from its metrics file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dsjax.train.metrics import JSONL, read_lines
from dsjax.train.smooth import smooth

BITS = 1 / np.log(2)


def draw(folder: Path) -> list[Path]:
    """Write loss.png, balance.png and, after an evaluation, load.png; returns their paths."""
    records = list(read_lines(folder / JSONL))
    steps = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not steps:
        return []
    drawn = [_loss(folder, steps, evals), _balance(folder, steps, evals)]
    if evals and evals[-1]["load"]:
        drawn.append(_load(folder, evals[-1]))
    return drawn


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _loss(folder: Path, steps: list[dict], evals: list[dict]) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4))
    x = np.array([r["step"] for r in steps])
    for name, label in (("loss", "next token"), ("mtp_loss", "MTP: one further")):
        y = np.array([r[name] for r in steps], float)
        if y.any():
            axes.plot(x, smooth(y, max(len(y) // 50, 1)), label=label, linewidth=1.2)
    if evals:
        axes.plot([r["step"] for r in evals], [r["loss"] for r in evals], "o-", label="held out")
    axes.set(xlabel="step", ylabel="nats a token", title="Loss")
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, folder / "loss.png")


def _balance(folder: Path, steps: list[dict], evals: list[dict]) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4))
    x = np.array([r["step"] for r in steps])
    layers = np.array([r["max_vio_layers"] for r in steps], float)
    width = max(len(x) // 50, 1)
    for layer in range(layers.shape[1]):
        axes.plot(x, smooth(layers[:, layer], width), linewidth=0.8, alpha=0.6)
    axes.plot(x, smooth(layers.mean(axis=1), width), "k", label="mean of layers, one batch")
    if evals:
        vio = [r["max_vio_global"] for r in evals]
        axes.plot([r["step"] for r in evals], vio, "ro", label="global, held out")
    axes.set(xlabel="step", ylabel="MaxVio", title="Expert imbalance", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, folder / "balance.png")


def _load(folder: Path, record: dict[str, Any]) -> Path:
    load = np.array(record["load"], float)
    relative = load / load.mean(axis=1, keepdims=True)
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.3 * len(load)))
    image = axes.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    axes.set(xlabel="expert", ylabel="MoE layer", title="Load of each expert, in means")
    axes.set_yticks(range(len(load)))
    figure.colorbar(image)
    return _save(figure, folder / "load.png")


def draw_comparison(runs: dict[str, Path], path: Path) -> Path:
    """Held-out loss against global MaxVio of several runs, one line a run."""
    figure, axes = plt.subplots(figsize=(6, 4.5))
    for name, folder in runs.items():
        evals = [r for r in read_lines(folder / JSONL) if r["kind"] == "eval"]
        vio, loss = [r["max_vio_global"] for r in evals], [r["loss"] * BITS for r in evals]
        axes.plot(vio, loss, "o-", alpha=0.7, label=name, markersize=3)
        axes.plot(vio[-1:], loss[-1:], "k*", markersize=10)
    axes.set(
        xlabel="MaxVio, global",
        ylabel="held-out bits a token (star: end)",
        title="Loss against imbalance",
        xlim=(0, None),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return _save(figure, path)
