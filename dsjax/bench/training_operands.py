"""Operands of the timed calls, as a training step has them.

* Activations and gradients are bfloat16, weights float32 masters. Tokens choose their experts at
  random, so that groups of rows differ in length; SwiGLU's backward pass has weights of rows where
  it has groups.
* Scales of rows are stored transposed, as the FP8 products read them, in operands and results, ours
  and XLA's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from dsjax.bench.quantized import quantized
from dsjax.bench.training_shapes import Shape
from pallas_kernels.quantize import quantize_tiles
from pallas_kernels.token_order import sort_by_expert

Operands = tuple[Any, ...]


def normal(key: PRNGKeyArray, shape: Shape) -> Operands:
    return (jax.random.normal(key, shape.axes, jnp.bfloat16),)


def masters(key: PRNGKeyArray, shape: Shape) -> Operands:
    return (jax.random.normal(key, shape.axes),)


def normed(key: PRNGKeyArray, shape: Shape) -> Operands:
    return *normal(key, shape), jax.random.normal(jax.random.fold_in(key, 1), shape.axes[1:])


def _group_sizes(key: PRNGKeyArray, shape: Shape) -> jax.Array | None:
    if not shape.groups:
        return None
    groups = jax.random.randint(key, shape.axes[:1], 0, shape.groups)
    return jnp.bincount(groups, length=shape.groups).astype(jnp.int32)


def grouped(key: PRNGKeyArray, shape: Shape) -> Operands:
    return *normal(key, shape), _group_sizes(jax.random.fold_in(key, 1), shape)


def cached(key: PRNGKeyArray, shape: Shape) -> Operands:
    x, sizes = grouped(key, shape)
    return *quantized(*quantize_tiles(x)), sizes


def swiglu_cached(key: PRNGKeyArray, shape: Shape) -> Operands:
    m, width = shape.axes
    cache, sizes = cached(key, shape)
    keys = jax.random.split(jax.random.fold_in(key, 2))
    weights = jax.random.uniform(keys[0], (m,)) if shape.groups else None
    return cache, jax.random.normal(keys[1], (m, width // 2), jnp.bfloat16), weights, sizes


def _slots(key: PRNGKeyArray, shape: Shape) -> jax.Array:
    tokens, choices, _ = shape.axes
    _, experts = jax.lax.top_k(jax.random.uniform(key, (tokens, shape.groups)), choices)
    return sort_by_expert(experts, shape.groups).slots


def tokens(key: PRNGKeyArray, shape: Shape) -> Operands:
    tokens, _, d = shape.axes
    return *normal(key, Shape((tokens, d))), _slots(jax.random.fold_in(key, 1), shape)


def tokens_quantized(key: PRNGKeyArray, shape: Shape) -> Operands:
    x, slots = tokens(key, shape)
    return *quantized(*quantize_tiles(x)), slots


def results(key: PRNGKeyArray, shape: Shape) -> Operands:
    tokens, choices, d = shape.axes
    keys = jax.random.split(key, 3)
    y = normal(keys[0], Shape((tokens * choices, d)))
    return *y, _slots(keys[1], shape), jax.random.uniform(keys[2], (tokens, choices))


def head(key: PRNGKeyArray, shape: Shape) -> Operands:
    b, t, d, p = shape.axes
    keys = jax.random.split(key, 3)
    head = jax.random.normal(keys[1], (d, p)) * d**-0.5
    return *normal(keys[0], Shape((b, t, d))), head, jax.random.randint(keys[2], (b, t), 0, p)
