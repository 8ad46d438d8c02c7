"""Eight CPU devices for every test, compiled programs kept between runs, and a GPU's memory left to
the other processes that run tests."""

import os
from pathlib import Path

import jax
import pytest

_CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(_CACHE_HOME / "dsjax" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine has no device for, and say so."""
    gpus = jax.device_count() if jax.default_backend() == "gpu" else 0
    for item in items:
        if item.get_closest_marker("gpu") and not gpus:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason="needs several NVIDIA GPUs"))
