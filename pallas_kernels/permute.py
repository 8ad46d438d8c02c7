"""Rows of tokens to their experts and back: gathers, and weighted sums of gathered rows.

The permutation of a mixture of experts without drops (MegaBlocks, arXiv 2211.15841): every token
goes to k experts, whose rows lie behind one another, so that T tokens become R = T * k rows.
Either side may name the other: `rows` [R] says which token a row is, `slots` [T, k] which rows a
token is. For the same result `gather_rows` reads each row of x k times and `spread_rows` once.

`backend="auto"` takes the Hopper kernels where they apply and plain jnp elsewhere. Moved values
keep their bits, NaN included. These functions belong inside the rules of a jax.custom_vjp:
differentiating them raises TypeError.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels import checks, gemm_backend
from pallas_kernels.checks import E4M3
from pallas_kernels.gemm_backend import Backend

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Float32, Int32, Shaped

    Quantized = tuple[Float8e4m3fn[Array, "R d"], Float32[Array, "R tiles"]]

MOVED = (E4M3, jnp.bfloat16, jnp.float32)
ROW_BYTES = 16  # a bulk copy is a whole number of these
ROW_MOST = 64 << 10  # bytes: a few rows have to fit shared memory
SUM_STEP = 128  # columns: one a thread
MOST_CHOICES = 32  # rows of a token, all at once in registers or on their way


def gather_rows(
    x: Shaped[Array, "T w"], rows: Int32[Array, " R"], *, backend: Backend = "auto"
) -> Shaped[Array, "R w"]:
    """x[rows], of x in e4m3, bfloat16 or float32.

    Rows outside of x raise ValueError where they are known; traced ones (under jit) are clamped to
    it. Raises ValueError on other inputs, and for backend="mosaic_gpu" on rows of x that are not
    multiples of 16 bytes or above 64 KiB.
    """
    checks.array("x", x, "[T, w]", *MOVED)
    checks.array("rows", rows, "[R]", jnp.int32)
    _within("rows", rows, "T", x.shape[0])
    x = _constant(x)
    if _moves(backend, x, rows):
        from pallas_kernels import sm90_permute

        return sm90_permute.gather(x, rows)
    return _take(x, rows)


def gather_quantized(
    q: Float8e4m3fn[Array, "T d"],
    scale: Float32[Array, "T tiles"],
    rows: Int32[Array, " R"],
    *,
    backend: Backend = "auto",
) -> Quantized:
    """(q[rows], scale[rows]) of e4m3 [T, d] with float32 scales [T, ceil(d / 128)].

    The scales that a kernel gives lie K-block-major in memory, as the grouped FP8 products want
    them and as `quantize_tiles` gives them. Rows and errors are those of `gather_rows`.
    """
    checks.fp8("q", q, scale, "[T, d]")
    checks.array("rows", rows, "[R]", jnp.int32)
    _within("rows", rows, "T", q.shape[0])
    q, scale = _constant(q), _constant(scale)
    if _moves(backend, q, rows):
        from pallas_kernels import sm90_permute

        return sm90_permute.gather_quantized(q, scale, rows)
    return _take(q, rows), _take(scale, rows)


def spread_rows(
    x: Shaped[Array, "T w"], slots: Int32[Array, "T k"], *, backend: Backend = "auto"
) -> Shaped[Array, "T*k w"]:
    """out [T * k, w] with out[slots[t, j]] = x[t], of x in e4m3, bfloat16 or float32.

    slots hold each of 0 to T * k - 1 once: others raise ValueError where they are known, and where
    they are traced (under jit) leave rows unspecified. Other errors are those of `gather_rows`, and
    for backend="mosaic_gpu" k above 32.
    """
    checks.array("x", x, "[T, w]", *MOVED)
    _check_permutation(x, slots)
    x = _constant(x)
    if _moves(backend, x, slots):
        from pallas_kernels import sm90_permute

        return sm90_permute.spread(x, slots)
    return _take(x, _rows_of(slots))


def spread_quantized(
    q: Float8e4m3fn[Array, "T d"],
    scale: Float32[Array, "T tiles"],
    slots: Int32[Array, "T k"],
    *,
    backend: Backend = "auto",
) -> Quantized:
    """`spread_rows` of q and of its scales, in the formats of `gather_quantized`."""
    checks.fp8("q", q, scale, "[T, d]")
    _check_permutation(q, slots)
    q, scale = _constant(q), _constant(scale)
    if _moves(backend, q, slots):
        from pallas_kernels import sm90_permute

        return sm90_permute.spread_quantized(q, scale, slots)
    rows = _rows_of(slots)
    return _take(q, rows), _take(scale, rows)


def combine_rows(
    y: Float[Array, "R d"],
    slots: Int32[Array, "T k"],
    weights: Float32[Array, "T k"] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Array, "T d"]:
    """out[t] = sum of weights[t, j] * y[slots[t, j]] over j; weights None are ones.

    y is bfloat16 or float32, and so is the result; products and sums are float32, in the order of
    j, and rounded once: repeated runs give the same bits. Rows that no slot names may hold
    anything. Slots outside of y raise ValueError where they are known; traced ones (under jit) are
    clamped to it. Raises ValueError on other inputs, and for backend="mosaic_gpu" on y in float32,
    on d that is not divisible by 128 and on k above 32.
    """
    checks.array("y", y, "[R, d]", jnp.bfloat16, jnp.float32)
    checks.array("slots", slots, "[T, k]", jnp.int32)
    if not slots.shape[1]:
        raise ValueError(f"slots is {slots.shape}: expected k of 1 or more")
    if weights is not None:
        checks.exact("weights", weights, slots.shape)
        weights = _constant(weights)
    _within("slots", slots, "R", y.shape[0])
    y = _constant(y)
    if _sums(backend, y, slots):
        from pallas_kernels import sm90_permute_combine

        return sm90_permute_combine.combine(y, slots, weights)
    parts = (_take(y, own).astype(jnp.float32) for own in slots.T)
    if weights is not None:
        parts = (part * weight[:, None] for part, weight in zip(parts, weights.T, strict=True))
    return functools.reduce(jnp.add, parts).astype(y.dtype)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(x, rows, axis=0, mode="clip")


def _rows_of(slots: jax.Array) -> jax.Array:
    """The token of each row."""
    tokens = jnp.arange(slots.size, dtype=jnp.int32) // max(1, slots.shape[1])
    return jnp.zeros(slots.size, jnp.int32).at[slots.reshape(-1)].set(tokens, mode="drop")


def _moves(backend: Backend, x: jax.Array, indices: jax.Array) -> bool:
    gemm_backend.check(backend)
    size = x.shape[1] * x.dtype.itemsize
    choices = math.prod(indices.shape[1:])
    fits = size % ROW_BYTES == 0 and size <= ROW_MOST and choices <= MOST_CHOICES
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(
            f"a row of {x.shape[1]} {x.dtype} has {size} bytes, k is {choices}: mosaic_gpu takes "
            f"multiples of {ROW_BYTES} up to {ROW_MOST} and k up to {MOST_CHOICES}"
        )
    return x.size > 0 and indices.size > 0 and fits and gemm_backend.takes_kernels(backend)


def _sums(backend: Backend, y: jax.Array, slots: jax.Array) -> bool:
    gemm_backend.check(backend)
    width, choices = y.shape[1], slots.shape[1]
    fits = y.dtype == jnp.bfloat16 and width % SUM_STEP == 0 and choices <= MOST_CHOICES
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(
            f"y is {y.dtype}, d {width} and k {choices}: mosaic_gpu takes bfloat16, multiples of "
            f"{SUM_STEP} and {MOST_CHOICES} at most"
        )
    return y.size > 0 and slots.size > 0 and fits and gemm_backend.takes_kernels(backend)


def _check_permutation(x: jax.Array, slots: jax.Array) -> None:
    checks.array("slots", slots, "[T, k]", jnp.int32)
    checks.same("T", 0, x=x, slots=slots)
    _within("slots", slots, "T * k", slots.size)
    if isinstance(slots, Tracer):
        return
    times = np.bincount(np.asarray(slots).reshape(-1), minlength=slots.size)
    if (times != 1).any():
        slot = int(np.argmax(times != 1))
        raise ValueError(f"slots hold {slot} {times[slot]} times: expected each slot once")


def _within(name: str, indices: jax.Array, letter: str, size: int) -> None:
    """ValueError where there is nothing to take, or indices are known and outside [0, size)."""
    if indices.size and not size:
        raise ValueError(f"{letter} is 0: {name} {indices.shape} can take nothing")
    if isinstance(indices, Tracer):
        return
    known = np.asarray(indices)
    outside = (known < 0) | (known >= size)
    if outside.any():
        at = np.unravel_index(np.argmax(outside), known.shape)
        place = ", ".join(map(str, at))
        raise ValueError(f"{name}[{place}] is {known[at]}: expected 0 to {letter} - 1 = {size - 1}")


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
    return x


@_constant.defjvp
def _refuse_gradient(primals: tuple, tangents: tuple) -> NoReturn:
    raise TypeError("permuted rows are not differentiable here: use them in a jax.custom_vjp")
