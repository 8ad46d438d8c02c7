"""Which results of the forward pass are worth keeping where a layer is computed again.

DeepSeek-V3 computes its norms, up-projections and SwiGLU again in the backward pass (report,
section 3.2.3). What the rest of a layer needs bears a name, which a policy of `jax.checkpoint` can
ask for: `jax.checkpoint_policies.save_only_these_names(KEPT)`.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"


def kept(tree: Any) -> Any:
    """The same arrays, named."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), tree)
