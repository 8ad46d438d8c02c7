"""DeepSeek's open stack in JAX.

import dsjax

model = dsjax.from_pretrained("path/to/checkpoint")
tokens = dsjax.generate(model, prompt_tokens, max_new_tokens=100)
dsjax.save_pretrained(model, "path/to/copy")
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Transformer": "dsjax.model",
    "from_pretrained": "dsjax.hf",
    "generate": "dsjax.infer",
    "load_run": "dsjax.train.restore",
    "save_pretrained": "dsjax.hf",
    "stream": "dsjax.infer",
    "train": "dsjax.train",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a room when its name is first asked for: `dsjax.config` alone needs no jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
