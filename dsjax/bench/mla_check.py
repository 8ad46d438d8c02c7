"""Whether timed attention is right, where it is small enough to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsjax.bench.ceilings import Device
from dsjax.bench.check import checked, noted
from dsjax.bench.mla_shapes import Kind, Shape, work
from dsjax.bench.rows import Row


def checked_row(
    row: Row[Kind, Shape], found: Any, reference: Callable[[], Any], device: Device
) -> Row[Kind, Shape]:
    """The row with its error, unless it is too large to check; failed where the error is large."""
    if work(row.kind, row.shape).flops > device.checked:
        return noted(row, "too large to check")
    return checked(row, found, reference)
