"""One training step: a pure, jitted function of state and batch that returns device arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsjax.model import RouterBias, Transformer
from dsjax.model.precision import fp8_gauges, fp8_values, with_fp8
from dsjax.parallel.devices import ALONE, MICRO_BATCHES, SAME, Alone
from dsjax.train.balance import max_violation, updated_bias
from dsjax.train.loss import Losses, losses, objective
from dsjax.train.optimizer import build_optimizer
from dsjax.train.schedule import bias_speed, learning_rate, mtp_weight
from pallas_kernels import fp8_gauge
from pallas_kernels.fp8_gauge import GAUGES
from pallas_kernels.fp8_recipe import Recipe

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


def weights_in_format(run: Run, params: PyTree, whole: bool = True) -> PyTree:
    """Parameters as the run multiplies with them, for `model_of`: in FP8 cast here and now.

    Those that are not `whole` are cast when they are (`Placement.gather`).
    """
    if run.precision != "fp8":
        return params
    values = fp8_values(params) if whole else None
    return with_fp8(params, fp8_gauges(params), values, fp8_recipe(run))


def fp8_recipe(run: Run) -> Recipe:
    return Recipe(run.fp8.sum_bits, run.fp8.gradient_blocks)


def build_step(
    run: Run, devices: Alone = ALONE
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The step on state, [micro-batches, batch, t + 1] tokens and how many of these count.

    The count is a device number, so a growing batch compiles once. The state is given up
    (donation).
    """
    optimizer = build_optimizer(run.optimizer, run.train.steps)
    rate = learning_rate(run.optimizer, run.train.steps)
    gradients = devices.on_each(
        functools.partial(_gradients, run, devices),
        (devices.params, SAME, SAME, MICRO_BATCHES, SAME),
        ((devices.params, SAME), SAME),
    )
    fp8 = run.precision == "fp8"

    def step(state: TrainState, micro_batches: jax.Array, count: jax.Array):
        inputs = state.params, state.bias, state.step, micro_batches, count
        (grads, gauges), parts = gradients(*inputs)
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
        if fp8:
            metrics |= _losses_of_fp8(gauges)
        return TrainState(state.step + 1, params, bias, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _gradients(
    run: Run, devices: Alone, params: PyTree, bias: PyTree, step: jax.Array,
    micro_batches: jax.Array, count: jax.Array,
) -> tuple[tuple[PyTree, PyTree], Losses]:  # fmt: skip
    """Of parameters and gauges the gradients, and the losses, by what one device has of each."""
    fp8, mtp = run.precision == "fp8", mtp_weight(run.mtp, step, run.train.steps)
    params = devices.together(params)
    # Whole weights once for all micro-batches; their gradients go past their FP8 values.
    gauges = fp8_gauges(params) if fp8 else {}
    cast = fp8_values(params) if fp8 and not devices.placement.gathers else None

    def loss(params: PyTree, gauges: PyTree, sequences: jax.Array):
        if fp8:
            params = with_fp8(params, gauges, cast, fp8_recipe(run))
        model = whole_model(run, params, bias, devices)
        parts = losses(model, sequences, devices.placement, run.train.remat)
        return objective(parts, run.balance, mtp), parts

    def differentiate(sequences: jax.Array) -> tuple[tuple[PyTree, PyTree], Losses]:
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (grads, counts), parts = gradient(params, gauges, sequences)
        return (devices.after_micro_batch(grads), counts), parts

    def accumulate(i: jax.Array, total: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, differentiate(micro_batches[i]))

    if micro_batches.shape[0] == 1:
        (grads, counts), parts = differentiate(micro_batches[0])
    else:
        shapes = jax.eval_shape(differentiate, micro_batches[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, parts = jax.lax.fori_loop(0, count, accumulate, zeros)
        (grads, counts), mean = jax.tree.map(lambda leaf: leaf / count, (sums, parts))
        parts = mean._replace(load_LE=parts.load_LE)
    counts = jax.tree.map(lambda leaf: leaf * fp8_gauge.shares(devices.placement.devices), counts)
    return (devices.after_all(grads), devices.total(counts)), devices.total(parts)


def whole_model(run: Run, params: PyTree, bias: PyTree, devices: Alone) -> Transformer:
    """The module around what one device has, with all that is not a layer's brought together."""
    model = model_of(run, params, bias)
    for name in ("embed", "head", "norm"):
        shared = getattr(model, name)
        shared.set_value(devices.placement.gather(name, shared[...]))
    return model


def _losses_of_fp8(gauges: PyTree) -> dict[str, jax.Array]:
    """Means over all weights of the shares of zeros, and the tiles that overflowed in all."""
    counts = jnp.concatenate([leaf.reshape(-1, GAUGES) for leaf in jax.tree.leaves(gauges)])
    inputs, gradients, overflow = counts.T
    return {
        "fp8_zero_inputs": inputs.mean(),
        "fp8_zero_inputs_most": inputs.max(),
        "fp8_zero_gradients": gradients.mean(),
        "fp8_zero_gradients_most": gradients.max(),
        "fp8_overflowed_tiles": overflow.sum(),
    }


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
