"""What cards can do at most, for model FLOPs utilisation."""

import jax

BF16_PEAK = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
}
"""Dense bf16 FLOP/s by the makers' data sheets, by `device_kind`."""


def bf16_peak() -> float | None:
    """Peak of all devices together, None where it is not known."""
    peak = BF16_PEAK.get(jax.devices()[0].device_kind)
    return peak * jax.device_count() if peak else None


def peak_memory_bytes() -> int | None:
    """Most memory in use on the first device so far, None where the platform does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
