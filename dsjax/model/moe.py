"""DeepSeekMoE (arXiv 2401.06066): fine-grained routed experts beside shared ones, none dropped.

The model owns the contract of an expert exchange, `Experts`: tokens and their routing go in, the
weighted sum of the experts' results comes out. `local_experts` does it on the device at hand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.init import normal
from dsjax.model.precision import project
from dsjax.model.router import Router, RouterStats, router_stats
from pallas_kernels import grouped_gemm

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Model


class Experts(Protocol):
    """Routed experts: where their weights lie and how tokens reach them."""

    def __call__(
        self,
        x_TD: Float[Array, "T d"],
        experts_TK: Int[Array, "T k"],
        weights_TK: Float[Array, "T k"],
        gate_up: Float[Array, "e d 2f"],
        down: Float[Array, "e f d"],
    ) -> Float[Array, "T d"]: ...


def swiglu(gate_up: Float[Array, "... 2f"]) -> Float[Array, "... f"]:
    """silu(gate) * up, gate being the first half."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def _dispatch(x_TD: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of x in expert order, each token k times; its backward is a gather, never a scatter."""
    return x_TD[order // (order.shape[0] // x_TD.shape[0])]


def _dispatch_bwd(saved: tuple, grad: jax.Array) -> tuple[jax.Array, None, None]:
    inverse, tokens = saved
    per_token = grad[inverse].reshape(tokens, -1, grad.shape[-1])
    return per_token.sum(axis=1, dtype=jnp.float32).astype(grad.dtype), None, None


_dispatch.defvjp(
    lambda x, order, inverse: (_dispatch(x, order, inverse), (inverse, x.shape[0])), _dispatch_bwd
)


@jax.custom_vjp
def _undo(rows: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows back in token order."""
    return rows[inverse]


_undo.defvjp(
    lambda rows, order, inverse: (_undo(rows, order, inverse), order),
    lambda order, grad: (grad[order], None, None),
)


def local_experts(
    x_TD: Float[Array, "T d"],
    experts_TK: Int[Array, "T k"],
    weights_TK: Float[Array, "T k"],
    gate_up: Float[Array, "e d 2f"],
    down: Float[Array, "e f d"],
) -> Float[Array, "T d"]:
    """All experts on this device: sort by expert, two grouped matmuls, weighted sum."""
    flat = experts_TK.reshape(-1)
    with jax.named_scope("dispatch"):
        order = jnp.argsort(flat, stable=True)
        inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
        sizes = jnp.bincount(flat, length=gate_up.shape[0]).astype(jnp.int32)
        rows = _dispatch(x_TD, order, inverse)
    with jax.named_scope("routed_experts"):
        hidden = swiglu(grouped_gemm(rows, gate_up.astype(x_TD.dtype), sizes))
        results = grouped_gemm(hidden, down.astype(x_TD.dtype), sizes)
    with jax.named_scope("combine"):
        per_choice = _undo(results, order, inverse).reshape(*experts_TK.shape, -1)
        total = (per_choice.astype(jnp.float32) * weights_TK[..., None]).sum(axis=1)
    return total.astype(x_TD.dtype)


class Mlp(nnx.Module):
    """SwiGLU; also the shape of all shared experts together."""

    def __init__(self, d: int, f: int, std: float, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.gate_up = normal(rngs, (d, 2 * f), std, param_dtype)
        self.down = normal(rngs, (f, d), std, param_dtype)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        hidden = swiglu(project("...d,df->...f", x, self.gate_up[...]))
        return project("...f,fd->...d", hidden, self.down[...])


class RoutedExperts(nnx.Module):
    """The weights of all routed experts, stacked."""

    def __init__(self, config: Model, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        e, d, f, std = config.experts, config.dim, config.expert_hidden, config.init_std
        self.gate_up = normal(rngs, (e, d, 2 * f), std, param_dtype)
        self.down = normal(rngs, (e, f, d), std, param_dtype)


class Moe(nnx.Module):
    def __init__(self, config: Model, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.router = Router(config, rngs=rngs, param_dtype=param_dtype)
        self.experts = RoutedExperts(config, rngs=rngs, param_dtype=param_dtype)
        shared = config.shared_experts * config.expert_hidden
        self.shared = (
            Mlp(config.dim, shared, config.init_std, rngs=rngs, param_dtype=param_dtype)
            if shared
            else None
        )

    def __call__(
        self, x: Float[Array, "b t d"], experts: Experts
    ) -> tuple[Float[Array, "b t d"], RouterStats]:
        """Routed plus shared experts, and the layer's routing statistics."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD)
        routed = experts(x_TD, routing.experts_TK, routing.weights_TK,
                         self.experts.gate_up[...], self.experts.down[...])  # fmt: skip
        out = routed.reshape(x.shape)
        if self.shared is not None:
            with jax.named_scope("shared_experts"):
                out = out + self.shared(x)
        return out, router_stats(routing, x.shape[0])
