"""Loss curves of a precision study, and how far each is from BF16's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dsjax.train.study import ALLOWED, BASE, Curve, relative


def draw_study(curves: Mapping[str, Curve], path: Path) -> Path:
    """Smoothed losses above; below, in per cent, each one's distance from BF16's."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 7), sharex=True)
    for curve in curves.values():
        above.plot(curve.steps, curve.smoothed, label=curve.name, linewidth=1.1)
        if BASE in curves and curve.name != BASE:
            steps, apart = relative(curve, curves[BASE])
            below.plot(steps, 100 * apart, label=curve.name, linewidth=1.1)
    above.set(ylabel="nats a token, smoothed", title="Training loss")
    above.legend()
    below.axhspan(-100 * ALLOWED, 100 * ALLOWED, alpha=0.15, color="green")
    below.set(xlabel="step", ylabel="% from BF16's (band: 0.25 %)", ylim=(-2, 2))
    below.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
