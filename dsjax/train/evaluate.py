"""Held-out loss in bits per byte, and the balance of experts over the whole held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.data import Packed, eval_batches
from dsjax.parallel.devices import ALONE, BATCH, SAME, Alone
from dsjax.train.balance import max_violation
from dsjax.train.loss import cross_entropy
from dsjax.train.step import TrainState, weights_in_format, whole_model

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from dsjax.config import Run


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats a token."""
    bits_per_byte: float
    """Over the UTF-8 bytes of the text; end-of-document tokens are paid for too."""
    max_vio_layers: list[float]
    load: list[list[int]]

    @property
    def max_vio_global(self) -> float:
        """Mean over the layers of MaxVio on all held-out text."""
        return float(np.mean(self.max_vio_layers)) if self.max_vio_layers else 0.0


def build_evaluate(
    run: Run,
    held_out: Packed,
    put: Callable[[np.ndarray], jax.Array],
    devices: Alone = ALONE,
) -> Callable[[TrainState, int | None], Evaluation]:
    """A function of state and number of batches (None: all of the held-out text)."""
    batch = run.train.batch // run.train.micro_batches

    def of_device(params: PyTree, bias: PyTree, sequences: jax.Array, mask: jax.Array):
        whole = not devices.placement.gathers
        params = weights_in_format(run, devices.together(params), whole)
        model = whole_model(run, params, bias, devices)
        hidden, stats = model.hidden(sequences[:, :-1], devices.placement)
        _, nats = cross_entropy(model, hidden, sequences[:, 1:])
        load = jnp.zeros((0, 1), jnp.int32) if stats is None else stats.load_E
        return devices.total((jnp.where(mask > 0, nats, 0.0).sum(), load))

    takes = devices.params, SAME, BATCH, BATCH
    score = jax.jit(devices.on_each(of_device, takes, SAME))

    def evaluate(state: TrainState, batches: int | None = None) -> Evaluation:
        nats, targets, load = 0.0, 0, 0
        for sequences, mask in islice(eval_batches(held_out, run.data.seq_len, batch), batches):
            part, routed = score(state.params, state.bias, put(sequences), put(mask))
            nats, load = nats + float(part), load + np.asarray(routed, np.int64)
            targets += int(mask.sum())
        read = targets / (len(held_out.tokens) - 1) * held_out.text_bytes
        vio = max_violation(jnp.asarray(load))
        return Evaluation(
            nats / targets, nats / math.log(2) / read, vio.tolist(), np.asarray(load).tolist()
        )

    return evaluate
