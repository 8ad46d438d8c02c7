"""Loss curves of a precision study, and how far each is from BF16's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dsjax.train.study import ALLOWED, BASE, Curve, difference, relative

SHOWN = 0.03  # relative difference that the picture goes up to


def draw_study(curves: Mapping[str, Curve], path: Path) -> Path:
    """Smoothed losses above; below, in per cent, each one's distance from BF16's."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 7), sharex=True)
    most = 2 * ALLOWED
    for number, curve in enumerate(curves.values()):
        how: Any = dict(label=curve.name, linewidth=1.1, color=f"C{number}")
        above.plot(curve.steps, curve.smoothed, **how)
        if BASE in curves and curve.name != BASE:
            steps, apart = relative(curve, curves[BASE])
            below.plot(steps, 100 * apart, **how)
            most = max(most, difference(curve, curves[BASE]).most)
    above.set(ylabel="nats a token, smoothed", title="Training loss")
    above.legend()
    below.axhspan(-100 * ALLOWED, 100 * ALLOWED, alpha=0.15, color="green")
    limit = 110 * min(most, SHOWN)
    below.set(xlabel="step", ylabel="% from BF16's (band: 0.25 %)", ylim=(-limit, limit))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
