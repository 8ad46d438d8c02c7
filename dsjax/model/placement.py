"""Where a model runs, as far as the model needs to know: on one device unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsjax.model.attention import local_attention
from dsjax.model.embedding import look_up
from dsjax.model.moe import Experts, local_experts

if TYPE_CHECKING:
    from dsjax.model.attention import Attention
    from dsjax.model.embedding import LookUp


def _as_is(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Placement:
    experts: Experts = local_experts
    """How tokens meet their routed experts."""
    attention: Attention = local_attention
    """How the tokens of a batch attend to each other; no kernel runs on a divided array."""
    look_up: LookUp = look_up
    """How tokens meet the embedding; its gradient sorts the tokens of one device."""
    gather: Callable[[Any], Any] = _as_is
    """Brings one layer's weights together before the layer runs (FSDP)."""
    spread: Callable[[Any], Any] = _as_is
    """Keeps activations [b, ...] spread over the devices by batch."""


LOCAL = Placement()
