"""What cards can do at most, for model FLOPs utilisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax

if TYPE_CHECKING:
    from dsjax.model.sizes import Work


class Peak(NamedTuple):
    """Dense FLOP/s of one card by its maker's data sheet; fp8 is None where it has none."""

    bf16: float
    fp8: float | None


PEAKS = {
    "NVIDIA H200": Peak(989e12, 1979e12),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 1979e12),
    "NVIDIA H800": Peak(989e12, 1979e12),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, None),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, None),
    "NVIDIA L4": Peak(121e12, 242e12),
}
"""By `device_kind`."""


def device_peak() -> Peak | None:
    """Of one device, None where it is not known."""
    return PEAKS.get(jax.devices()[0].device_kind)


def utilisation(tokens_per_second: float, work: Work) -> dict[str, float]:
    """Model FLOP/s of all devices (causal), and the shares of their bf16 peak where it is known.

    `mfu` counts attention to all keys, as DeepSeek does, `mfu_causal` to those a token sees.
    Nothing that is computed again counts, and FP8 is held against the bf16 peak too.
    """
    figures = {"model_flops_per_second": tokens_per_second * work.causal}
    if peak := device_peak():
        most = peak.bf16 * jax.device_count()
        figures["mfu"] = tokens_per_second * work.full / most
        figures["mfu_causal"] = tokens_per_second * work.causal / most
    return figures


def peak_memory_bytes() -> int | None:
    """Most memory in use so far on this process's first device, None where that is not told."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
