"""The training loss: next token, MTP (V3 equations 24 and 25) and the auxiliary losses.

The logits of a whole batch never exist at once: the head runs over slices of time, and the
backward pass computes each slice again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.model import LOCAL, Placement, RouterStats, Transformer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Balance, Remat

LOGITS_AT_ONCE = 2**29


class Losses(NamedTuple):
    """Means over the batch, unweighted; stats hold the MoE layers' routing, then MTP's."""

    main: Float[Array, ""]
    mtp: Float[Array, ""]
    sequence_aux: Float[Array, ""]
    batch_aux: Float[Array, ""]
    load_LE: Int[Array, "l e"]


def negative_log_likelihood(
    model: Transformer, hidden: Float[Array, "b t d"], targets: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """Nats of each target, from normed hidden states, in slices of time."""
    b, t = targets.shape
    fitting = max(LOGITS_AT_ONCE // (b * model.config.vocab_size), 1)
    slices = next(n for n in range(-(-t // fitting), t + 1) if t % n == 0)
    if slices == 1:
        return _nats(model.logits(hidden), targets)

    def one(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _nats(model.logits(piece[0]), piece[1])

    pieces = (
        hidden.reshape(b, slices, t // slices, -1).swapaxes(0, 1),
        targets.reshape(b, slices, -1).swapaxes(0, 1),
    )
    return jax.lax.map(jax.checkpoint(one), pieces).swapaxes(0, 1).reshape(b, t)


def _nats(logits: Float[Array, "b t p"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def losses(
    model: Transformer,
    sequences: Int[Array, "b t+1"],
    placement: Placement = LOCAL,
    remat: Remat = "none",
) -> Losses:
    """All parts of the loss on sequences of one token more than the model reads."""
    tokens, targets = sequences[:, :-1], sequences[:, 1:]
    hidden, stats = model.hidden(tokens, placement, remat)
    main = negative_log_likelihood(model, hidden, targets).mean()
    mtp, further_stats = _mtp_loss(model, hidden, sequences, placement)
    parts = [part for part in (stats, further_stats) if part is not None]
    if not parts:
        zero = jnp.zeros(())
        return Losses(main, mtp, zero, zero, jnp.zeros((0, 1), jnp.int32))
    joined = RouterStats(*[jnp.concatenate(leaf) for leaf in zip(*parts, strict=True)])
    aux = joined.sequence_aux.sum(), joined.batch_aux.sum()
    return Losses(main, mtp, *aux, joined.load_E)


def _mtp_loss(
    model: Transformer,
    hidden: Float[Array, "b t d"],
    sequences: Int[Array, "b t+1"],
    placement: Placement,
) -> tuple[Float[Array, ""], RouterStats | None]:
    depth, t = model.config.mtp_depth, hidden.shape[1]
    if not depth:
        return jnp.zeros(()), None
    shifted = jnp.stack([jnp.roll(sequences, -i, axis=1)[:, :t] for i in range(1, depth + 2)])
    states, stats = model.predict_further(hidden, shifted[:-1], placement)
    total = jnp.zeros(())
    for i, (state, targets) in enumerate(zip(states, shifted[1:], strict=True), start=1):
        nats = negative_log_likelihood(model, state, targets)
        known = jnp.arange(t) < t - i
        total += jnp.where(known, nats, 0.0).sum() / (nats.shape[0] * (t - i))
    return total / depth, stats


def objective(parts: Losses, balance: Balance, mtp_weight: Float[Array, ""]) -> Float[Array, ""]:
    """The weighted sum that is minimised."""
    return (
        parts.main
        + mtp_weight * parts.mtp
        + balance.sequence_aux * parts.sequence_aux
        + balance.batch_aux * parts.batch_aux
    )
