"""Where a model runs, as far as the model needs to know: on one device unless told otherwise.

On several devices everything here runs inside `jax.shard_map`: a device has sequences of its own
and its part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pallas_kernels.token_order import HERE, Exchange

if TYPE_CHECKING:
    import jax


GATHERED = "gathered"
"""Name of what `Placement.gather` brought together, which the backward pass had better gather again
than keep."""


def _as_is(kind: str, weights: Any) -> Any:
    return weights


def _alone(x: jax.Array) -> jax.Array:
    return x


@dataclass(frozen=True)
class Placement:
    devices: int = 1
    """Among which a batch is divided."""
    exchange: Exchange = HERE
    """How tokens meet their routed experts."""
    gather: Callable[[str, Any], Any] = _as_is
    """Brings weights together before they are used (FSDP): one layer's of a kind, `dense`, `moe` or
    `mtp`, or `embed`, `head` or `norm`."""
    total: Callable[[jax.Array], jax.Array] = _alone
    """Sums over the devices."""

    @property
    def gathers(self) -> bool:
        return self.gather is not _as_is


LOCAL = Placement()
