"""Tokens to the ranks that hold their experts and back, between the GPUs of one host.

DeepEP's intranode dispatch and combine (github.com/deepseek-ai/DeepEP) for a program that runs
under `jax.shard_map`, given `check_vma=False`: `axis` names the mesh's R ranks, of which each has T
tokens and some of the experts. Token t of rank s has the number s * T + t everywhere. A rank knows

  slots  [R * T, k]  the row here, in the order of experts, of choice j of each token; negative
                     where that choice's expert lives elsewhere
  tokens [R * T]     the tokens that have a row here, ascending; those behind the first
  count  [1]         of them may be anything
  ranks  [T, R]      of its own tokens: whether rank r has a row of it

`dispatch_rows` fills the rows of a rank's experts. After them `reduce_rows` adds up the rows that a
token has on this rank, with their weights, and `combine_ranks` what the ranks have for it. Every
row crosses a link once a rank, in either direction. All rows that are not named, in operands or
results, are unspecified: kernels neither read nor write them. For the few tokens of a decoding step
there is `low_latency`.

`backend="auto"` takes the Hopper kernels where they apply, which is within one process, and plain
jnp elsewhere. Moved values keep their bits, NaN included. These functions belong inside the rules
of a jax.custom_vjp: differentiating them raises TypeError.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import checks, gemm_backend
from pallas_kernels.checks import E4M3
from pallas_kernels.gemm_backend import Backend
from pallas_kernels.permute import MOST_CHOICES, MOVED, ROW_BYTES, ROW_MOST, SUM_STEP

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float8e4m3fn, Float32, Int32, Shaped

    from pallas_kernels.sm90_peers import Peers

Axis = str | tuple[str, ...]


def dispatch_rows(
    x: Shaped[Array, "T w"],
    slots: Int32[Array, "R*T k"],
    tokens: Int32[Array, " R*T"],
    count: Int32[Array, " 1"],
    *,
    rows: int,
    axis: Axis,
    ctas: int | None = None,
    backend: Backend = "auto",
) -> Shaped[Array, "rows w"]:
    """out [rows, w] with out[slots[s * T + t, j]] = row t of rank s's x, for the listed tokens.

    x is e4m3, bfloat16 or float32; slots outside of [0, rows) are left out; `ctas` is how many SMs
    the kernel takes. Raises ValueError on other inputs, on an axis that jax.shard_map does not map,
    and for backend="mosaic_gpu" on rows of x that are not multiples of 16 bytes or above 64 KiB, on
    k above 32, in programs of several processes, and where jax.shard_map leaves other axes to XLA.
    """
    checks.array("x", x, "[T, w]", *MOVED)
    _check_tokens(slots, tokens, count)
    _check_dispatch(x, slots, rows, ctas, axis)
    x = constant(x)
    if _moves(backend, x, slots) and (peers := reachable_peers(backend, axis)):
        from pallas_kernels import sm90_expert_dispatch as sm90

        ctas = ctas or sm90.CTAS
        return sm90.dispatch(x, slots, tokens, count, rows=rows, peers=peers, ctas=ctas)
    return everyones(x, axis, tokens_of(slots, rows))


def dispatch_quantized(
    q: Float8e4m3fn[Array, "T d"],
    scale: Float32[Array, "T tiles"],
    slots: Int32[Array, "R*T k"],
    tokens: Int32[Array, " R*T"],
    count: Int32[Array, " 1"],
    *,
    rows: int,
    axis: Axis,
    ctas: int | None = None,
    backend: Backend = "auto",
) -> tuple[Float8e4m3fn[Array, "rows d"], Float32[Array, "rows tiles"]]:
    """`dispatch_rows` of e4m3 [T, d] and of its float32 scales [T, ceil(d / 128)].

    The scales come as rows do, beside their tokens.
    """
    peers = peers_for_quantized(q, scale, slots, tokens, count, rows, axis, ctas, backend)
    q, scale = constant(q), constant(scale)
    if peers:
        from pallas_kernels import sm90_expert_dispatch as sm90

        given, ctas = (q, scale, slots, tokens, count), ctas or sm90.CTAS
        return sm90.dispatch_quantized(*given, rows=rows, peers=peers, ctas=ctas)
    of = tokens_of(slots, rows)
    return everyones(q, axis, of), everyones(scale, axis, of)


def reduce_rows(
    y: Float[Array, "rows d"],
    slots: Int32[Array, "R*T k"],
    weights: Float32[Array, "R*T k"] | None,
    tokens: Int32[Array, " R*T"],
    count: Int32[Array, " 1"],
    *,
    backend: Backend = "auto",
) -> Float[Array, "R*T d"]:
    """out[token] = sum of weights[token, j] * y[slots[token, j]] over the slots that are there.

    For the listed tokens; slots outside of [0, rows) are left out, weights None are ones. y is
    bfloat16 or float32, and so is the result; products and sums are float32, in the order of j, and
    rounded once: repeated runs give the same bits. Nothing crosses a link. Raises ValueError on
    other inputs, and for backend="mosaic_gpu" on y in float32, on d that is not divisible by 128
    and on k above 32.
    """
    checks.array("y", y, "[rows, d]", jnp.bfloat16, jnp.float32)
    _check_tokens(slots, tokens, count)
    if weights is not None:
        checks.exact("weights", weights, slots.shape)
        weights = constant(weights)
    y = constant(y)
    if _sums(backend, y, slots, "k"):
        from pallas_kernels import sm90_expert_combine

        return sm90_expert_combine.reduce_rows(y, slots, weights, tokens, count)
    by = jnp.ones(slots.shape, jnp.float32) if weights is None else weights
    named = _within(slots, y.shape[0])
    columns = zip(named.T, slots.T, by.T, strict=True)
    parts = (_part(_take(y, row), there, weight) for there, row, weight in columns)
    return _added(parts, (slots.shape[0], y.shape[1])).astype(y.dtype)


def combine_ranks(
    partial: Float[Array, "R*T d"],
    ranks: Bool[Array, "T R"] | Int32[Array, "T R"],
    *,
    axis: Axis,
    ctas: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "T d"]:
    """out[t] = sum of row me * T + t of rank r's `partial` over the ranks r with ranks[t, r].

    partial is bfloat16 or float32, and so is the result; sums are float32, in the order of ranks,
    and rounded once: repeated runs give the same bits. `ctas` and errors are those of
    `dispatch_rows`, and for backend="mosaic_gpu" also those of `reduce_rows`, with R for k.
    """
    checks.array("partial", partial, "[R * T, d]", jnp.bfloat16, jnp.float32)
    _check_ranks(ranks, axis)
    tokens, count = ranks.shape
    checks.exact("partial", partial, (count * tokens, partial.shape[1]), partial.dtype)
    _check_ctas(ctas)
    partial = constant(partial)
    if _sums(backend, partial, ranks, "R") and (peers := reachable_peers(backend, axis)):
        from pallas_kernels import sm90_expert_combine as sm90

        return sm90.combine(partial, ranks, peers=peers, ctas=ctas or sm90.CTAS)
    mine = lax.all_to_all(partial.reshape(count, tokens, -1), axis, 0, 0)
    parts = (_part(row, there) for there, row in zip(ranks.T != 0, mine, strict=True))
    return _added(parts, (tokens, partial.shape[1])).astype(partial.dtype)


def combine_rows(
    y: Float[Array, "rows d"],
    slots: Int32[Array, "R*T k"],
    weights: Float32[Array, "R*T k"] | None,
    tokens: Int32[Array, " R*T"],
    count: Int32[Array, " 1"],
    ranks: Bool[Array, "T R"] | Int32[Array, "T R"],
    *,
    axis: Axis,
    ctas: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "T d"]:
    """`combine_ranks` of `reduce_rows`, bit for bit, in one kernel; errors are those of both.

    `tokens` list all that have a slot. A ValueError, too, for more `ctas` than the card runs at
    once.
    """
    peers = peers_for_sums(y, slots, weights, tokens, count, ranks, axis, ctas, backend)
    if peers:
        from pallas_kernels.sm90_expert_push import combine_push

        weights = weights if weights is None else constant(weights)
        return combine_push(constant(y), slots, weights, ranks, peers=peers, ctas=ctas)
    partial = reduce_rows(y, slots, weights, tokens, count, backend=backend)
    return combine_ranks(partial, ranks, axis=axis, ctas=ctas, backend=backend)


# --- references --------------------------------------------------------------------------------


def everyones(x: jax.Array, axis: Axis, rows: jax.Array | None = None) -> jax.Array:
    """[R * T, w] of all ranks, or these rows of it; FP8 as bytes, which XLA never converts."""
    moved = lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == E4M3 else x
    found = lax.all_gather(moved, axis, tiled=True)
    found = found if rows is None else _take(found, rows)
    return lax.bitcast_convert_type(found, E4M3) if x.dtype == E4M3 else found


def tokens_of(slots: jax.Array, rows: int) -> jax.Array:
    """The token of each row, 0 where there is none."""
    named = jnp.where(_within(slots, rows), slots, rows)
    tokens = lax.broadcasted_iota(jnp.int32, slots.shape, 0)
    return jnp.zeros(rows, jnp.int32).at[named].set(tokens, mode="drop")


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(x, rows, axis=0, mode="clip")


def _within(slots: jax.Array, rows: int) -> jax.Array:
    return (slots >= 0) & (slots < rows)


def _part(rows: jax.Array, there: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """The rows that are there in float32, zeros in place of others, which may be NaN."""
    rows = rows.astype(jnp.float32)
    rows = rows if weight is None else rows * weight[:, None]
    return jnp.where(there[:, None], rows, 0)


def _added(parts: Any, shape: tuple[int, ...]) -> jax.Array:
    return functools.reduce(jnp.add, parts, jnp.zeros(shape, jnp.float32))


# --- checks ------------------------------------------------------------------------------------


def peers_for_quantized(
    q: jax.Array, scale: jax.Array, slots: jax.Array, tokens: jax.Array, count: jax.Array,
    rows: int, axis: Axis, ctas: int | None, backend: Backend,
) -> Peers | None:  # fmt: skip
    """The ranks whose kernels dispatch it, None where jnp does; errors of `dispatch_quantized`."""
    checks.fp8("q", q, scale, "[T, d]")
    _check_tokens(slots, tokens, count)
    _check_dispatch(q, slots, rows, ctas, axis)
    return reachable_peers(backend, axis) if _moves(backend, q, slots) else None


def peers_for_sums(
    y: jax.Array, slots: jax.Array, weights: jax.Array | None, tokens: jax.Array, count: jax.Array,
    ranks: jax.Array, axis: Axis, ctas: int | None, backend: Backend,
) -> Peers | None:  # fmt: skip
    """The ranks whose kernels combine it, None where jnp does; errors of `combine_rows`."""
    _check_tokens(slots, tokens, count)
    _check_ranks(ranks, axis)
    checks.array("y", y, "[rows, d]", jnp.bfloat16, jnp.float32)
    if weights is not None:
        checks.exact("weights", weights, slots.shape)
    _check_ctas(ctas)
    return reachable_peers(backend, axis) if _sums(backend, y, slots, "k") else None


def _check_tokens(slots: jax.Array, tokens: jax.Array, count: jax.Array) -> None:
    checks.array("slots", slots, "[R * T, k]", jnp.int32)
    if not slots.shape[1]:
        raise ValueError(f"slots is {slots.shape}: expected k of 1 or more")
    checks.exact("tokens", tokens, slots.shape[:1], jnp.int32)
    checks.exact("count", count, (1,), jnp.int32)


def _check_dispatch(
    x: jax.Array, slots: jax.Array, rows: int, ctas: int | None, axis: Axis
) -> None:
    if rows < 1:
        raise ValueError(f"rows is {rows}: expected 1 or more")
    _check_ctas(ctas)
    ranks = rank_count(axis)
    if slots.shape[0] != ranks * x.shape[0]:
        wanted = f"{ranks} ranks on {axis!r} * T = {ranks * x.shape[0]}"
        raise ValueError(f"slots is {slots.shape}: expected a row for each of {wanted} tokens")
    if not x.shape[0]:
        raise ValueError(f"x is {x.shape}: expected T of 1 or more")


def _check_ranks(ranks: jax.Array, axis: Axis) -> None:
    checks.array("ranks", ranks, "[T, R]", jnp.bool, jnp.int32)
    if ranks.shape[1] != (count := rank_count(axis)):
        raise ValueError(f"ranks is {ranks.shape}: expected R = {count} as on {axis!r}")


def _check_ctas(ctas: int | None) -> None:
    if ctas is not None and ctas < 1:
        raise ValueError(f"ctas is {ctas}: expected 1 or more, or None")


def rank_count(axis: Axis) -> int:
    try:
        return lax.axis_size(axis)
    except NameError as error:
        raise ValueError(f"axis is {axis!r}: expected one that jax.shard_map maps") from error


def _moves(backend: Backend, x: jax.Array, slots: jax.Array) -> bool:
    gemm_backend.check(backend)
    size, choices = x.shape[1] * x.dtype.itemsize, slots.shape[1]
    fits = size % ROW_BYTES == 0 and size <= ROW_MOST and choices <= MOST_CHOICES
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(
            f"a row of {x.shape[1]} {x.dtype} has {size} bytes, k is {choices}: mosaic_gpu takes "
            f"multiples of {ROW_BYTES} up to {ROW_MOST} and k up to {MOST_CHOICES}"
        )
    return fits and x.size > 0 and gemm_backend.takes_kernels(backend)


def _sums(backend: Backend, y: jax.Array, choices: jax.Array, letter: str) -> bool:
    gemm_backend.check(backend)
    width, most = y.shape[1], choices.shape[1]
    fits = y.dtype == jnp.bfloat16 and width % SUM_STEP == 0 and most <= MOST_CHOICES
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(
            f"{y.dtype}, d {width} and {letter} {most}: mosaic_gpu takes bfloat16, multiples of "
            f"{SUM_STEP} and {MOST_CHOICES} at most"
        )
    return fits and y.size > 0 and choices.size > 0 and gemm_backend.takes_kernels(backend)


def reachable_peers(backend: Backend, axis: Axis) -> Peers | None:
    """The other ranks where kernels reach their memory, which is within one process."""
    from pallas_kernels.sm90_peers import Peers

    try:
        if (processes := jax.process_count()) > 1:
            raise ValueError(f"this program has {processes} processes: mosaic_gpu takes one")
        return Peers.along(axis)
    except ValueError:
        if backend == "mosaic_gpu":
            raise
        return None


@jax.custom_jvp
def constant(x: jax.Array) -> jax.Array:
    return x


@constant.defjvp
def _refuse_gradient(primals: tuple, tangents: tuple) -> NoReturn:
    raise TypeError("exchanged rows are not differentiable here: use them in a jax.custom_vjp")
