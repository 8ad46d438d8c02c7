"""The language-model head and its loss in one: cross-entropy of `hidden @ head`, with gradients.

Logits of a whole batch never exist at once, and those of a slice of time are made once: the
forward pass of a differentiated call goes on from them to both gradients, three products in all.
The backward pass multiplies what is there by a scalar. On Hopper a kernel makes of the logits what
both need while they are in registers, and never writes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import checks, gemm_backend, sm90_cross_entropy
from pallas_kernels.gemm_backend import Backend

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

LOGITS_AT_ONCE = 2**29  # float32 elements of a slice; of the kernel's, in bfloat16, twice as many
FLOATS = (jnp.bfloat16, jnp.float32)


class _Rows(NamedTuple):
    """A slice of time: hidden [b, t, d], targets [b, t], weights [b, t]."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


def linear_cross_entropy(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d p"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"] | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, ""], Float[Array, "b t"]]:
    """(sum of weights * nats, nats), both float32: nats are -log softmax(hidden @ head)[target].

    hidden and head are bfloat16 or float32; products take hidden's dtype, to which head is cast,
    and add up in float32. Targets lie in [0, p), nats of others are NaN. weights are float32, None
    for ones. The sum is differentiable in hidden and head, each gradient of its argument's dtype,
    head's summed in float32; nats are for reporting and have no gradient, nor do weights.

    The kernel takes bfloat16 hidden, d a multiple of 64 and p of 256, and arrays that are not
    divided over devices: `auto` takes it where there is one device and inside `jax.shard_map`,
    which then needs `check_vma=False`. Raises ValueError on dtypes, shapes or a backend that do
    not fit.
    """
    _check(hidden, head, targets, weights)
    kernel = _takes_kernel(hidden, head, backend)
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    loss, nats = _cross_entropy(hidden, head, targets, lax.stop_gradient(weights), kernel)
    return loss, lax.stop_gradient(nats)


def _takes_kernel(hidden: jax.Array, head: jax.Array, backend: Backend) -> bool:
    hopper, fits = gemm_backend.takes_kernels(backend), sm90_cross_entropy.fits(hidden, head)
    if backend == "mosaic_gpu" and not fits:
        raise ValueError(f"hidden {hidden.dtype} {hidden.shape} and head {head.shape}: mosaic_gpu "
                         "takes bfloat16, d a multiple of 64 and p of 256")  # fmt: skip
    whole = jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual
    return hopper and fits and (whole or backend == "mosaic_gpu")


def _check(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array | None
) -> None:
    checks.array("hidden", hidden, "[b, t, d]", *FLOATS)
    checks.array("head", head, "[d, p]", *FLOATS)
    if hidden.shape[2] != head.shape[0]:
        raise ValueError(f"d is {hidden.shape[2]} in hidden {hidden.shape} and {head.shape[0]} in "
                         f"head {head.shape}: expected the same")  # fmt: skip
    if 0 in (*hidden.shape, *head.shape):
        raise ValueError(f"hidden {hidden.shape} and head {head.shape}: expected no empty axis")
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets is {targets.dtype} {targets.shape}: "
                         f"expected integers {hidden.shape[:2]}")  # fmt: skip
    if weights is not None:
        checks.exact("weights", weights, targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, kernel: bool
) -> tuple[jax.Array, jax.Array]:
    cast = head.astype(hidden.dtype)

    def one(_: None, rows: _Rows) -> tuple[None, jax.Array]:
        return None, _score(rows, cast, kernel)[0]

    _, nats = _over_time(one, None, _Rows(hidden, targets, weights), head.shape[1], kernel)
    return (weights * nats).sum(), nats


def _forward(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, kernel: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    cast = head.astype(hidden.dtype)

    def one(d_head: jax.Array, rows: _Rows) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        nats, gradient = _score(rows, cast, kernel)
        # Both products read it: XLA is not to make it twice inside them.
        d_logits = lax.optimization_barrier(gradient(rows.weights))
        d_hidden = _product("btp,dp->btd", d_logits, cast, hidden.dtype)
        d_head = d_head + _product("btd,btp->dp", rows.hidden, d_logits)
        return d_head, (nats, d_hidden)

    start = jnp.zeros(head.shape, jnp.float32)
    rows = _Rows(hidden, targets, weights)
    d_head, (nats, d_hidden) = _over_time(one, start, rows, head.shape[1], kernel)
    return ((weights * nats).sum(), nats), (d_hidden, d_head.astype(head.dtype), weights)


def _backward(
    kernel: bool, saved: tuple[jax.Array, ...], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, np.ndarray, jax.Array]:
    d_hidden, d_head, weights = saved
    by = grads[0]
    no_targets = np.zeros(weights.shape, jax.dtypes.float0)
    d_hidden, d_head = ((by * d).astype(d.dtype) for d in (d_hidden, d_head))
    return d_hidden, d_head, no_targets, jnp.zeros_like(weights)


_cross_entropy.defvjp(_forward, _backward)


def _over_time[Carry](
    one: Callable[[Carry, _Rows], tuple[Carry, Any]],
    carry: Carry,
    rows: _Rows,
    width: int,
    kernel: bool,
) -> tuple[Carry, Any]:
    """`lax.scan` of one(carry, rows) over as few slices of time as LOGITS_AT_ONCE allows."""
    b, t = rows.targets.shape
    fitting = max(LOGITS_AT_ONCE * (2 if kernel else 1) // (b * width), 1)
    slices = next(n for n in range(-(-t // fitting), t + 1) if t % n == 0)
    if slices == 1:
        return one(carry, rows)
    cut = [x.reshape(b, slices, t // slices, *x.shape[2:]).swapaxes(0, 1) for x in rows]
    carry, outs = lax.scan(one, carry, _Rows(*cut))
    return carry, jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, t, *x.shape[3:]), outs)


def _product(
    equation: str, x: jax.Array, y: jax.Array, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Sums in float32; a GPU would take TF32 for float32 operands otherwise."""
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=exact, preferred_element_type=dtype)


def _score(
    rows: _Rows, head: jax.Array, kernel: bool
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Nats, and a function of weights: in hidden's dtype, the gradient of nats' weighted sum with
    respect to the logits."""
    score = sm90_cross_entropy.score if kernel else _plain_score
    nats, gradient = score(rows.hidden, head, rows.targets)
    known = (rows.targets >= 0) & (rows.targets < head.shape[1])
    return jnp.where(known, nats, jnp.nan), gradient


def _plain_score(
    hidden: jax.Array, head: jax.Array, targets: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    logits = _product("btd,dp->btp", hidden, head)
    total = _log_sum_exp(logits)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]

    def gradient(weights: jax.Array) -> jax.Array:
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
        over = jnp.exp(logits - total[..., None]) - hit
        return (over * weights[..., None]).astype(hidden.dtype)

    return total - chosen, gradient


def _log_sum_exp(logits: jax.Array) -> jax.Array:
    """In one pass: `jax.nn.logsumexp` reads logits twice, for the maximum and for the sum."""

    def join(one: tuple, other: tuple) -> tuple[jax.Array, jax.Array]:
        (most, total), (most_there, total_there) = one, other
        shrink = jnp.exp(-jnp.abs(most - most_there))
        above = most >= most_there
        joined = jnp.where(above, total + total_there * shrink, total * shrink + total_there)
        return jnp.maximum(most, most_there), joined

    least = jnp.float32(jnp.finfo(jnp.float32).min)
    most, total = lax.reduce(
        (logits, jnp.ones_like(logits)), (least, jnp.float32(0)), join, (logits.ndim - 1,)
    )
    return most + jnp.log(total)
