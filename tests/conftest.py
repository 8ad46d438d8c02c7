"""Eight CPU devices for every test, and compiled programs kept between runs."""

import os
from pathlib import Path

import jax

_CACHE_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(_CACHE_HOME / "dsjax" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
