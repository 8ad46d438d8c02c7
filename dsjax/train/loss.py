"""The training loss: next token, MTP (V3 equations 24 and 25) and the auxiliary losses.

The logits of a whole batch never exist at once: `linear_cross_entropy` runs the head over slices
of time, and makes both gradients of a slice while its logits are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.model import LOCAL, Placement, RouterStats, Transformer
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from dsjax.config import Balance, Remat


class Losses(NamedTuple):
    """Means over the batch, unweighted, or a device's share of them, which add up to these."""

    main: Float[Array, ""]
    mtp: Float[Array, ""]
    sequence_aux: Float[Array, ""]
    batch_aux: Float[Array, ""]
    load_LE: Int[Array, "l e"]
    """Of this device's tokens: the MoE layers', then MTP's."""


@jax.named_scope("head")
def cross_entropy(
    model: Transformer,
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "b t"]]:
    """The weighted sum of nats and, without a gradient, each target's, from normed hidden states.

    ValueError where shapes do not fit.
    """
    return linear_cross_entropy(hidden, model.head[...], targets, weights)


def losses(
    model: Transformer,
    sequences: Int[Array, "b t+1"],
    placement: Placement = LOCAL,
    remat: Remat = "none",
) -> Losses:
    """All parts of the loss on sequences of one token more than the model reads.

    On several devices these are one device's sequences, and its share of the batch's loss.
    """
    tokens, targets = sequences[:, :-1], sequences[:, 1:]
    hidden, stats = model.hidden(tokens, placement, remat)
    each = jnp.full(targets.shape, 1 / (targets.size * placement.devices))
    main, _ = cross_entropy(model, hidden, targets, each)
    mtp, further_stats = _mtp_loss(model, hidden, sequences, placement)
    parts = [part for part in (stats, further_stats) if part is not None]
    if not parts:
        zero = jnp.zeros(())
        return Losses(main, mtp, zero, zero, jnp.zeros((0, 1), jnp.int32))
    joined = RouterStats(*[jnp.concatenate(leaf) for leaf in zip(*parts, strict=True)])
    batch = joined._replace(
        load_E=placement.total(joined.load_E),
        share_E=placement.total(joined.share_E) / placement.devices,
    )
    aux = joined.sequence_aux.sum(), batch.batch_aux.sum()
    return Losses(main, mtp, *(part / placement.devices for part in aux), joined.load_E)


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
        known = (jnp.arange(t) < t - i) / (len(targets) * (t - i) * placement.devices)
        weights = jnp.broadcast_to(known, targets.shape).astype(jnp.float32)
        total += cross_entropy(model, state, targets, weights)[0]
    return total / depth, stats


def objective(parts: Losses, balance: Balance, mtp_weight: Float[Array, ""]) -> Float[Array, ""]:
    """The weighted sum that is minimised."""
    return (
        parts.main
        + mtp_weight * parts.mtp
        + balance.sequence_aux * parts.sequence_aux
        + balance.batch_aux * parts.batch_aux
    )
