"""Which card a program is traced for."""

import jax


def is_gpu() -> bool:
    return jax.default_backend() == "gpu"


def compute_capability() -> float:
    """That of the first GPU, 9.0 for Hopper; 0 where there is none."""
    found = getattr(jax.devices()[0], "compute_capability", None) if is_gpu() else None
    return float(found) if found else 0.0


def is_hopper() -> bool:
    """Compute capability 9.0: the cards that have WGMMA and TMA as these kernels use them."""
    return compute_capability() == 9.0


def require_hopper(backend: str) -> None:
    """ValueError where that backend's kernels cannot run."""
    if not is_hopper():
        found = jax.devices()[0].device_kind
        raise ValueError(
            f"backend is {backend!r}: its kernels need a Hopper GPU (H100, H200), and this process "
            f"has {found}; 'auto' takes what runs here"
        )
