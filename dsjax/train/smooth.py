"""Running means."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def smooth(values: Float[np.ndarray, " n"], width: int) -> Float[np.ndarray, " n"]:
    """Running mean over the last `width` values, of fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(1, len(values) + 1)
    first = np.maximum(index - width, 0)
    return (total[index] - total[first]) / (index - first)
