"""Where a model runs, as far as the model needs to know: on one device unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsjax.model.moe import Experts, local_experts


def _as_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Placement:
    experts: Experts = local_experts
    """How tokens meet their routed experts."""
    gather: Callable[[Any], Any] = _as_is
    """Brings one layer's weights together before the layer runs (FSDP)."""
    spread: Callable[[Any], Any] = _as_is
    """Keeps activations [b, ...] spread over the devices by batch."""


LOCAL = Placement()
