"""The timed calls: the public functions on operands that `training_operands` draws.

XLA's way is the same function with backend="reference", jitted. It is what results are compared
with too, the head's on operands in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dsjax.bench import training_operands as operands
from dsjax.bench.quantized import Quantized, quantized
from dsjax.bench.shapes import Work
from dsjax.bench.training_operands import Operands
from dsjax.bench.training_shapes import Kind, Shape, flops
from pallas_kernels.device import is_hopper
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.permute import combine_rows, spread_quantized, spread_rows
from pallas_kernels.quantize import (
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
    requantize_transposed,
    rmsnorm_quantize,
    swiglu_quantize_both,
)
from pallas_kernels.swiglu_backward import swiglu_backward

EPS = 1e-6


class Timed(NamedTuple):
    """How the operands of a shape are drawn, and the call on them."""

    draw: Callable[[PRNGKeyArray, Shape], Operands]
    call: Callable[..., Any]


@functools.partial(jax.jit, static_argnames=("kind", "shape"))
def make(key: PRNGKeyArray, kind: Kind, shape: Shape) -> Operands:
    return TIMED[kind].draw(key, shape)


def call(kind: Kind, backend: Backend, x: Operands) -> Any:
    """All results of that kind on operands that `make` gave."""
    return TIMED[kind].call(*x, backend=backend)


def kernels() -> Backend:
    """On Hopper the kernels or an error: `auto` would take XLA's way, unsaid, for sizes that they
    do not take and on hosts of several cards."""
    return "mosaic_gpu" if is_hopper() else "auto"


def reference(kind: Kind, x: Operands) -> Any:
    if kind.startswith("linear_cross_entropy"):
        hidden, *others = x
        x = (hidden.astype(jnp.float32), *others)
    return jax.jit(functools.partial(call, kind, "reference"))(x)


@functools.cache
def work(kind: Kind, shape: Shape) -> Work:
    """The head's products; of all calls every operand read once, every result written once."""
    x = jax.eval_shape(lambda key: make(key, kind, shape), jax.random.key(0))
    arrays = jax.tree.leaves((x, jax.eval_shape(functools.partial(call, kind, "reference"), x)))
    return Work(flops(kind, shape), sum(each.size * each.dtype.itemsize for each in arrays))


def _tiles(x: jax.Array, *, backend: Backend) -> Any:
    return quantized(*quantize_tiles(x, backend=backend))


def _both(x: jax.Array, sizes: jax.Array | None, *, backend: Backend) -> Any:
    return quantized(*quantize_both(x, sizes, backend=backend))


def _transposed(x: jax.Array, sizes: jax.Array | None, *, backend: Backend) -> Any:
    return quantized(*quantize_transposed(x, sizes, backend=backend))


def _requantized(x: Quantized, sizes: jax.Array | None, *, backend: Backend) -> Any:
    return quantized(*requantize_transposed(*x.pair, sizes, backend=backend))


def _rmsnorm(x: jax.Array, weight: jax.Array, *, backend: Backend) -> Any:
    return quantized(*rmsnorm_quantize(x, weight, EPS, backend=backend))


def _swiglu(gate_up: jax.Array, *, backend: Backend) -> Any:
    product, cache = swiglu_quantize_both(gate_up, backend=backend)
    return quantized(*product, *cache)


def _swiglu_backward(
    cache: Quantized, d_h: jax.Array, weights: jax.Array | None, sizes: jax.Array | None, *,
    backend: Backend,
) -> Any:  # fmt: skip
    found = swiglu_backward(*cache.pair, d_h, weights, sizes, backend=backend)
    return quantized(*found.grad, *found.grad_t, *found.h_t), found.d_weights


def _spread_quantized(x: Quantized, slots: jax.Array, *, backend: Backend) -> Any:
    return quantized(*spread_quantized(*x.pair, slots, backend=backend))


def _cross_entropy_grad(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, backend: Backend
) -> Any:
    loss = functools.partial(linear_cross_entropy, targets=targets, backend=backend)
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


TIMED: dict[Kind, Timed] = {
    "quantize_tiles": Timed(operands.normal, _tiles),
    "quantize_both": Timed(operands.grouped, _both),
    "quantize_transposed": Timed(operands.grouped, _transposed),
    "requantize_transposed": Timed(operands.cached, _requantized),
    "quantize_blocks_both": Timed(operands.masters, quantize_blocks_both),
    "rmsnorm_quantize": Timed(operands.normed, _rmsnorm),
    "swiglu_quantize_both": Timed(operands.normal, _swiglu),
    "swiglu_backward": Timed(operands.swiglu_cached, _swiglu_backward),
    "spread_rows": Timed(operands.tokens, spread_rows),
    "spread_quantized": Timed(operands.tokens_quantized, _spread_quantized),
    "combine_rows": Timed(operands.results, combine_rows),
    "linear_cross_entropy": Timed(operands.head, linear_cross_entropy),
    "linear_cross_entropy_grad": Timed(operands.head, _cross_entropy_grad),
}
