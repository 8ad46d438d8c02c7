"""Tokens looked up in a table, with a gradient that does not depend on chance.

Equal tokens' gradients have to be added up. XLA adds them in memory, on a GPU in the order in which
they happen to arrive, so that no two runs have the same bits. Here tokens are sorted first;
products with zeros and ones then add up what is equal within a block, and what lies across blocks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.model.float32 import exactness

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

BLOCK = 128


def look_up(
    table: Float[Array, "p d"], tokens: Int[Array, "..."], dtype: DTypeLike
) -> Float[Array, "... d"]:
    """`table[tokens]` in dtype; gradients are summed in float32."""
    return _look_up(jnp.dtype(dtype), table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table[tokens].astype(dtype)


def _backward(dtype: jnp.dtype, saved: tuple, grad: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    rows = grad.reshape(-1, table.shape[1])
    return summed_by_token(rows, tokens.reshape(-1), len(table)).astype(table.dtype), None


_look_up.defvjp(
    lambda dtype, table, tokens: (_look_up(dtype, table, tokens), (table, tokens)), _backward
)


def summed_by_token(
    rows: Float[Array, "n d"], tokens: Int[Array, " n"], vocab_size: int
) -> Float[Array, "p d"]:
    """The sums of rows with equal tokens, in float32; zeros for tokens that do not occur."""
    n, d = rows.shape
    order, missing = jnp.argsort(tokens, stable=True), -n % BLOCK
    tokens = jnp.pad(tokens[order], (0, missing), constant_values=vocab_size)
    rows = jnp.pad(rows[order], ((0, missing), (0, 0))).reshape(-1, BLOCK, d)
    sums = _across(tokens.reshape(-1, BLOCK), _within(tokens.reshape(-1, BLOCK), rows))
    last = (tokens != jnp.roll(tokens, -1)) | (jnp.arange(len(tokens)) == len(tokens) - 1)
    nowhere = vocab_size + jnp.arange(len(tokens))
    place = jnp.where(last & (tokens < vocab_size), tokens, nowhere)
    table = jnp.zeros((vocab_size, d), jnp.float32)
    return table.at[place].set(sums.reshape(-1, d), mode="drop", unique_indices=True)


def _within(tokens: jax.Array, rows: jax.Array) -> jax.Array:
    """At each place [b, i] the sum over all of its block that have its token."""
    alike = (tokens[:, :, None] == tokens[:, None]).astype(rows.dtype)
    return jnp.einsum(
        "bij,bjd->bid", alike, rows, precision=exactness(rows.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _across(tokens: jax.Array, sums: jax.Array) -> jax.Array:
    """With what earlier blocks have of a token: it is a block's first and stands at their ends."""
    first, block = tokens[:, :1], jnp.arange(len(tokens))
    shared = (first == tokens[:, -1]) & (block[:, None] > block)
    carried = jnp.einsum(
        "ab,bd->ad", shared.astype(jnp.float32), sums[:, -1], precision=exactness(sums.dtype)
    )
    return sums + jnp.where((tokens == first)[..., None], carried[:, None], 0)
