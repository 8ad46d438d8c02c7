"""Text from a model: one jitted prefill, then one jitted step a token on the latent cache.

Prompt and cache lengths are rounded up to powers of two, so few shapes are ever compiled; a cache
is whole pages of 64 tokens, as decoding's kernel takes it. The module's arrays are flattened once:
handing a module to jit costs more than a small step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.infer.sample import choose
from dsjax.model import LatentCache, Transformer
from pallas_kernels.latent_cache import PAGE

if TYPE_CHECKING:
    from jaxtyping import Int

SMALLEST = 32


def generate(
    model: Transformer,
    prompt_tokens: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, "*b n"]:
    """`max_new_tokens` tokens after each prompt; prompts are [t] or [b, t] of equal length.

    Raises ValueError for prompts that are empty, too long or hold ids beyond the vocabulary, and
    for settings out of range.
    """
    steps = list(stream(model, prompt_tokens, max_new_tokens, temperature, top_p, seed))
    tokens = np.stack(steps, axis=1) if steps else np.zeros((_rows(prompt_tokens), 0), np.int32)
    return tokens if np.ndim(prompt_tokens) == 2 else tokens[0]


def stream(
    model: Transformer,
    prompt_tokens: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Int[np.ndarray, " b"]]:
    """As `generate`, one token of every prompt at a time, each as soon as it is known."""
    prompt = _checked_prompt(model, prompt_tokens, max_new_tokens)
    if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: temperature must be 0 or more "
            "and top_p greater than 0, at most 1"
        )
    return _tokens(model, prompt, max_new_tokens, temperature, top_p, seed)


def _tokens(
    model: Transformer, prompt: np.ndarray, count: int, temperature: float, top_p: float, seed: int
) -> Iterator[np.ndarray]:
    b, t = prompt.shape
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    static = _Static(graph, tree)
    padded = np.zeros((b, _bucket(t)), np.int32)
    padded[:, :t] = prompt
    sampling = (jnp.float32(temperature), jnp.float32(top_p))
    key = jax.random.key(seed)
    capacity = max(_bucket(t + count), PAGE)
    lengths = jnp.full((b,), t, jnp.int32)
    token, cache = _prefill(static, leaves, padded, lengths, capacity, key, sampling)
    for i in range(count):
        upcoming = None
        if i + 1 < count:
            upcoming = _decode(static, leaves, token, cache, key, jnp.int32(i + 1), sampling)
        yield np.asarray(token)
        if upcoming is not None:
            token, cache = upcoming


class _Static:
    """Structure of a model: equal structures share compiled programs."""

    def __init__(self, graph: Any, tree: Any):
        self.graph, self.tree = graph, tree

    def __hash__(self) -> int:
        return hash((self.graph, self.tree))

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Static)
        return same and self.graph == other.graph and self.tree == other.tree

    def model(self, leaves: list[jax.Array]) -> Transformer:
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(static, leaves, tokens, lengths, capacity, key, sampling):
    logits, cache = static.model(leaves).prefill(tokens, lengths, capacity)
    return choose(logits, jax.random.fold_in(key, 0), *sampling), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(static, leaves, token, cache: LatentCache, key, step, sampling):
    logits, cache = static.model(leaves).decode(token[:, None], cache)
    return choose(logits[:, 0], jax.random.fold_in(key, step), *sampling), cache


def _bucket(length: int) -> int:
    return max(SMALLEST, 1 << (length - 1).bit_length())


def _rows(prompt_tokens: Any) -> int:
    return np.shape(prompt_tokens)[0] if np.ndim(prompt_tokens) == 2 else 1


def _checked_prompt(model: Transformer, prompt_tokens: Any, count: int) -> np.ndarray:
    prompt = np.atleast_2d(np.asarray(prompt_tokens))
    if prompt.ndim != 2 or prompt.size == 0 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"prompt_tokens is {prompt.dtype} {prompt.shape}: give at least one "
            "integer token, as [t] or [b, t]"
        )
    vocab = model.config.vocab_size
    if prompt.min() < 0 or prompt.max() >= vocab:
        wrong = prompt[(prompt < 0) | (prompt >= vocab)][0]
        raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab}")
    if count < 0:
        raise ValueError(f"max_new_tokens is {count}: it must be 0 or more")
    if prompt.shape[1] + count > model.config.context:
        raise ValueError(
            f"{prompt.shape[1]} prompt tokens and {count} new ones exceed the model's "
            f"context of {model.config.context}"
        )
    return prompt.astype(np.int32)
