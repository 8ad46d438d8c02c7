"""Which card a program is traced for."""

import jax


def is_gpu() -> bool:
    return jax.default_backend() == "gpu"


def is_hopper() -> bool:
    """Compute capability 9.0: the cards that have WGMMA and TMA as these kernels use them."""
    return is_gpu() and getattr(jax.devices()[0], "compute_capability", "") == "9.0"
