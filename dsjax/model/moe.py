"""DeepSeekMoE (arXiv 2401.06066): fine-grained routed experts beside shared ones, none dropped.

Tokens meet their experts through an `Exchange`: on one device, or on several that share the experts
out among them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.model.init import normal
from dsjax.model.precision import plain, project
from dsjax.model.replicas import Replicas
from dsjax.model.router import Router, RouterStats, router_stats
from pallas_kernels import grouped_gemm
from pallas_kernels.fp8_experts import fp8_experts
from pallas_kernels.fp8_layers import fp8_mlp
from pallas_kernels.fp8_weight import Fp8Weight
from pallas_kernels.kept import kept
from pallas_kernels.token_order import HERE, Exchange, Order

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Model
    from dsjax.model.precision import Weight


@jax.custom_vjp
def swiglu(
    gate_up: Float[Array, "... 2f"], weights: Float[Array, "..."] | None = None
) -> Float[Array, "... f"]:
    """silu(gate) * up, the first half being the gate, times a weight for every row if given.

    In float32, rounded once; computed again for the gradient, which keeps gate_up alone.
    """
    gate, up = _halves(gate_up)
    return _weighted(jax.nn.silu(gate) * up, weights).astype(gate_up.dtype)


def _halves(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gate.astype(jnp.float32), up.astype(jnp.float32)


def _weighted(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    return x if weights is None else x * weights[..., None]


def _swiglu_bwd(saved: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    gate_up, weights = saved
    gate, up = _halves(gate_up)
    grad, sigmoid = grad.astype(jnp.float32), jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_weights = None
    if weights is not None:
        # Without the barrier XLA adds up a row in one thread, inside of what takes the sums.
        d_weights = jax.lax.optimization_barrier((grad * silu * up).sum(axis=-1))
    grad = _weighted(grad, weights)
    d_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    d_gate_up = jnp.concatenate([d_gate, grad * silu], axis=-1).astype(gate_up.dtype)
    return d_gate_up, d_weights


swiglu.defvjp(lambda gate_up, weights=None: (swiglu(gate_up, weights), (gate_up, weights)),
              _swiglu_bwd)  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(exchange: Exchange, x_TD: jax.Array, order: Order) -> jax.Array:
    """A copy of each token for each of its experts, in their order."""
    return exchange.dispatch(x_TD, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(exchange: Exchange, rows: jax.Array, order: Order) -> jax.Array:
    """The sum of each token's copies: the transpose of `_dispatch`."""
    return exchange.combine(rows, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_row(exchange: Exchange, weights_TK: jax.Array, order: Order) -> jax.Array:
    """Of each row its choice's weight; backward each choice takes its row's, too."""
    return exchange.by_row(weights_TK, order)


_dispatch.defvjp(
    lambda exchange, x, order: (_dispatch(exchange, x, order), order),
    lambda exchange, order, grad: (_combine(exchange, grad, order), None),
)
_combine.defvjp(
    lambda exchange, rows, order: (_combine(exchange, rows, order), order),
    lambda exchange, order, grad: (_dispatch(exchange, grad, order), None),
)
_by_row.defvjp(
    lambda exchange, weights, order: (_by_row(exchange, weights, order), order),
    lambda exchange, order, grad: (exchange.by_choice(grad, order), None),
)


def routed_experts(
    x_TD: Float[Array, "T d"],
    experts_TK: Int[Array, "T k"],
    weights_TK: Float[Array, "T k"],
    gate_up: Weight,
    down: Weight,
    exchange: Exchange = HERE,
    shared: Mlp | None = None,
) -> Float[Array, "T d"]:
    """Tokens to their experts, two grouped matmuls over the rows of each, weighted sums back.

    gate_up and down are the experts of this device, experts_TK count those of all. What `shared`
    makes of all tokens is added; in FP8 it is computed while they are on their way. The routing
    weights meet the experts' inner activations, a factor a row either side of the second matmul, so
    that their gradient does not need its results.
    """
    if isinstance(gate_up, Fp8Weight) and isinstance(down, Fp8Weight):
        both = None if shared is None else (shared.gate_up[...], shared.down[...])
        return fp8_experts(x_TD, experts_TK, weights_TK, gate_up, down, both, exchange=exchange)
    gate_up, down = plain(gate_up, x_TD.dtype), plain(down, x_TD.dtype)
    with jax.named_scope("dispatch"):
        order = kept(exchange.order(experts_TK, gate_up.shape[0]))
        rows = _dispatch(exchange, x_TD, order)
        weights = _by_row(exchange, weights_TK, order)
    with jax.named_scope("routed_experts"):
        inner = kept(grouped_gemm(rows, gate_up, order.sizes))
        hidden = swiglu(inner, weights)
        results = grouped_gemm(hidden, down, order.sizes)
    with jax.named_scope("combine"):
        routed = _combine(exchange, results, order)
    if shared is None:
        return routed
    with jax.named_scope("shared_experts"):
        return routed + shared(x_TD)


class Mlp(nnx.Module):
    """SwiGLU; also the shape of all shared experts together."""

    def __init__(self, d: int, f: int, std: float, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        self.gate_up = normal(rngs, (d, 2 * f), std, param_dtype)
        self.down = normal(rngs, (f, d), std, param_dtype)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        gate_up, down = self.gate_up[...], self.down[...]
        if isinstance(gate_up, Fp8Weight) and isinstance(down, Fp8Weight):
            return fp8_mlp(x.reshape(-1, x.shape[-1]), gate_up, down).reshape(x.shape)
        inner = kept(project("...d,df->...f", x, gate_up))
        return project("...f,fd->...d", swiglu(inner), down)


class RoutedExperts(nnx.Module):
    """The weights of all routed experts, stacked; of copies of some where there are replicas."""

    def __init__(self, config: Model, *, rngs: nnx.Rngs, param_dtype: jnp.dtype):
        e, d, f, std = config.experts, config.dim, config.expert_hidden, config.init_std
        self.gate_up = normal(rngs, (e, d, 2 * f), std, param_dtype)
        self.down = normal(rngs, (e, f, d), std, param_dtype)
        self.replicas: Replicas | None = nnx.data(None)


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
        self, x: Float[Array, "b t d"], exchange: Exchange = HERE
    ) -> tuple[Float[Array, "b t d"], RouterStats]:
        """Routed plus shared experts, and the layer's routing statistics."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD)
        experts = self.experts.gate_up[...], self.experts.down[...]
        chosen, replicas = routing.experts_TK, self.experts.replicas
        chosen = chosen if replicas is None else replicas(chosen)
        out = routed_experts(x_TD, chosen, routing.weights_TK, *experts, exchange, self.shared)
        return out.reshape(x.shape), router_stats(routing, x.shape[0])
