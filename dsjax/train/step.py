"""One training step: a pure, jitted function of state and batch that returns device arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsjax.model import LOCAL, Placement, RouterBias, Transformer
from dsjax.train.balance import max_violation, updated_bias
from dsjax.train.loss import Losses, losses, objective
from dsjax.train.optimizer import build_optimizer
from dsjax.train.schedule import bias_speed, learning_rate, mtp_weight

if TYPE_CHECKING:
    from jaxtyping import Array, Int, PyTree

    from dsjax.config import Run


class TrainState(NamedTuple):
    step: Int[Array, ""]
    params: PyTree[Array]
    bias: PyTree[Array]
    """The router bias of every MoE layer, MTP's too."""
    optimizer: PyTree[Array]


def abstract_model(run: Run) -> Transformer:
    """The run's model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: _new_model(run, 0))


def _new_model(run: Run, seed: int | jax.Array) -> Transformer:
    return Transformer(run.model, rngs=nnx.Rngs(seed), precision=run.precision)


def initial_state(run: Run) -> TrainState:
    """Fresh parameters (float32 masters) drawn from the run's seed; jit it with shardings."""
    _, params, bias = nnx.split(_new_model(run, run.train.seed), nnx.Param, RouterBias)
    params, bias = nnx.to_pure_dict(params), nnx.to_pure_dict(bias)
    optimizer = build_optimizer(run.optimizer, run.train.steps).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, bias, optimizer)


def model_of(run: Run, params: PyTree, bias: PyTree) -> Transformer:
    """The module around the given arrays."""
    graph, param_state, bias_state = nnx.split(abstract_model(run), nnx.Param, RouterBias)
    nnx.replace_by_pure_dict(param_state, params)
    nnx.replace_by_pure_dict(bias_state, bias)
    return nnx.merge(graph, param_state, bias_state)


def build_step(
    run: Run, placement: Placement = LOCAL
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step on state, [micro-batches, batch, t + 1] tokens and how many of these count.

    The count is a device number, so a growing batch compiles once. The state is given up
    (donation).
    """
    optimizer = build_optimizer(run.optimizer, run.train.steps)
    rate = learning_rate(run.optimizer, run.train.steps)

    def loss(params: PyTree, bias: PyTree, sequences: jax.Array, weight: jax.Array):
        model = model_of(run, params, bias)
        for shared in (model.embed, model.head):
            shared[...] = placement.gather(shared[...])
        parts = losses(model, sequences, placement, run.train.remat)
        return objective(parts, run.balance, weight), parts

    def gradients(state: TrainState, micro_batches: jax.Array, count: jax.Array):
        weight = mtp_weight(run.mtp, state.step, run.train.steps)

        def differentiate(sequences: jax.Array) -> tuple[PyTree, Losses]:
            return jax.grad(loss, has_aux=True)(state.params, state.bias, sequences, weight)

        if micro_batches.shape[0] == 1:
            return differentiate(micro_batches[0])

        def accumulate(i: jax.Array, total: tuple[PyTree, Losses]) -> tuple[PyTree, Losses]:
            return jax.tree.map(jnp.add, total, differentiate(micro_batches[i]))

        shapes = jax.eval_shape(differentiate, micro_batches[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        grads, parts = jax.lax.fori_loop(0, count, accumulate, zeros)
        mean = jax.tree.map(lambda leaf: leaf / count, (grads, parts))
        return mean[0], mean[1]._replace(load_LE=parts.load_LE)

    def step(state: TrainState, micro_batches: jax.Array, count: jax.Array):
        grads, parts = gradients(state, micro_batches, count)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        speed = bias_speed(run.balance, state.step, run.train.steps)
        bias = _move_bias(state.bias, parts.load_LE, speed)
        violation = max_violation(parts.load_LE)
        metrics = {
            "loss": parts.main,
            "mtp_loss": parts.mtp,
            "sequence_aux": parts.sequence_aux,
            "batch_aux": parts.batch_aux,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state.step),
            "max_vio": violation.mean() if violation.size else jnp.zeros(()),
            "max_vio_layers": violation,
        }
        return TrainState(state.step + 1, params, bias, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _move_bias(bias: PyTree, load_LE: Int[Array, "l e"], speed: jax.Array) -> PyTree:
    """Every bias by its own layer's load; the rows are the MoE layers, then MTP's depths."""
    moved, row = {}, 0
    if "moe" in bias:
        table = bias["moe"]["mlp"]["router"]["bias"]
        row = table.shape[0]
        new = updated_bias(table, load_LE[:row], speed)
        moved["moe"] = {"mlp": {"router": {"bias": new}}}
    if "mtp" in bias:
        moved["mtp"] = {}
        for depth in sorted(bias["mtp"]):
            table = bias["mtp"][depth]["block"]["mlp"]["router"]["bias"]
            new = updated_bias(table, load_LE[row + int(depth)], speed)
            moved["mtp"][depth] = {"block": {"mlp": {"router": {"bias": new}}}}
    return moved
