"""Which row each token gets on the rank of its experts, worked out on the device.

Rows lie by expert, and within one by rank and token. On Hopper one kernel reads the choices of all
ranks over NVLink and counts; elsewhere they are gathered and counted by matrix products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import checks, expert_exchange, gemm_backend
from pallas_kernels.gemm_backend import Backend

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, Int32

COUNTED = 128
"""Rows of a block that is counted by one product."""


class ExpertLayout(NamedTuple):
    """Of S = ranks * T tokens, by rank and number."""

    slots: Int32[Array, "S k"]
    """The row on this rank of each choice, -1 where its expert is another rank's."""
    sizes: Int32[Array, " e"]
    """Rows of each of this rank's experts."""
    tokens: Int32[Array, " S"]
    """Those that have a row here, ascending; only the first `count` count."""
    count: Int32[Array, "1"]


def expert_layout(
    experts_TK: Int32[Array, "T k"], experts: int, *, axis: str, backend: Backend = "auto"
) -> ExpertLayout:
    """The layout on this rank of `axis`, each having `experts` experts, the first the first ones.

    Inside jax.shard_map. experts_TK, int32 [T, k], are this rank's tokens' choices among the
    experts of all; a token's experts differ, and one below 0 is none. Raises ValueError on other
    inputs, on experts below 1, and for backend="mosaic_gpu" where the kernel does not fit.
    """
    checks.array("experts_TK", experts_TK, "[T, k]", jnp.int32)
    if experts < 1:
        raise ValueError(f"experts is {experts}: expected 1 or more on each rank")
    if (peers := _peers(experts_TK, experts, axis, backend)) is not None:
        from pallas_kernels import sm90_expert_layout

        return ExpertLayout(*sm90_expert_layout.layout(experts_TK, count=experts, peers=peers))
    every = jax.lax.all_gather(experts_TK, axis, tiled=True)
    return place(every, jax.lax.axis_index(axis) * experts, experts)


def _peers(experts_TK: jax.Array, experts: int, axis: str, backend: Backend) -> Any:
    """The ranks if the kernel takes them."""
    if not gemm_backend.takes_kernels(backend):
        return None
    from pallas_kernels import sm90_expert_layout

    peers, (t, k) = expert_exchange.reachable_peers(backend, axis), experts_TK.shape
    fits = peers is not None and sm90_expert_layout.fits(t, k, experts, peers.count)
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(
            f"T is {t}, k {k} and experts {experts}: mosaic_gpu takes multiples of 128 tokens, of "
            "more where there are more than 16,384, and as many choices as shared memory has room"
        )
    return peers if fits else None


def place(experts_SK: Int[Array, "S k"], first: Int[Array, ""] | int, experts: int) -> ExpertLayout:
    """The layout of the experts `first`, first + 1, ... and so many, from the choices of all."""
    mine = experts_SK - first
    of_expert = mine[:, :, None] == jnp.arange(experts)
    has = of_expert.any(axis=1)
    counted = count_along(jnp.concatenate([has, has.any(axis=1, keepdims=True)], axis=1))
    until, sizes, before = counted[:, :-1], counted[-1, :-1], counted[:, -1]
    row = until - 1 + jnp.cumsum(sizes) - sizes
    slots = jnp.where(of_expert, row[:, None] + 1, 0).sum(axis=2) - 1
    numbers = jnp.arange(len(has), dtype=jnp.int32)
    at = jnp.where(has.any(axis=1), before - 1, len(has) + numbers)
    tokens = jnp.zeros_like(numbers).at[at].set(numbers, mode="drop", unique_indices=True)
    return ExpertLayout(slots, sizes, tokens, before[-1:])


def slots_by_expert(
    experts_SK: Int[Array, "S k"], first: Int[Array, ""] | int, experts: int
) -> tuple[Int32[Array, "S k"], Int32[Array, " e"]]:
    """(slots, sizes) where each of these experts has S rows of its own, of which tokens fill some.

    A token has one row for an expert, also where it names that twice; slots are -1 where none.
    """
    mine = experts_SK - first
    of_expert = mine[:, :, None] == jnp.arange(experts)
    until = count_along(of_expert.any(axis=1))
    row = until - 1 + jnp.arange(experts, dtype=jnp.int32) * len(mine)
    slots = jnp.where(of_expert, row[:, None] + 1, 0).sum(axis=2) - 1
    return slots, until[-1]


def count_along(x_SE: Bool[Array, "S e"]) -> Int[Array, "S e"]:
    """How often each column was true down to each row.

    By products with triangles of ones, which are exact: a GPU would add up row by row.
    """
    rows, width = x_SE.shape
    blocks = jnp.pad(x_SE, ((0, -rows % COUNTED), (0, 0))).reshape(-1, COUNTED, width)
    within = _sums_to(blocks.astype(jnp.bfloat16))
    totals = within[:, -1].astype(jnp.bfloat16)  # up to COUNTED, which bfloat16 holds exactly
    before = _sums_to(totals) - totals.astype(jnp.float32)
    return (within + before[:, None]).reshape(-1, width)[:rows].astype(jnp.int32)


def _sums_to(x: Float[Array, "*b n e"]) -> Float[Array, "*b n e"]:
    """Sums of rows down to each, in float32."""
    ones = jnp.tril(jnp.ones((x.shape[-2],) * 2, jnp.bfloat16))
    return jnp.einsum("ij,...je->...ie", ones, x, preferred_element_type=jnp.float32)
