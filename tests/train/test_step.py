"""One step: accumulation, padding, the motion of the router bias, a single compilation."""

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.train import step as module
from dsjax.train.step import build_step

BATCH, MICRO = 8, 4
# Adam divides by the size of a gradient: a large eps keeps round-off in tiny ones small.
SMOOTH = {"eps": 1e-3}


def tokens(seed: int, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 260, (batch, 33), np.int32)


def close(left: object, right: object) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module", autouse=True)
def loads_in_the_metrics() -> Iterator[None]:
    """Every layer's load in place of its MaxVio."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "max_violation", lambda load: load.astype(jnp.float32))
        yield


@pytest.fixture(scope="module")
def whole(tiny_run, fresh_state) -> SimpleNamespace:
    """The step on one batch, its result, and the result's metrics."""
    step = build_step(tiny_run(optimizer=SMOOTH))
    state, metrics = step(fresh_state(), tokens(0)[None], jnp.int32(1))
    return SimpleNamespace(step=step, state=state, metrics=metrics)


@pytest.fixture(scope="module")
def in_parts(tiny_run):
    """The step on micro-batches."""
    return build_step(tiny_run(optimizer=SMOOTH, train={"micro_batches": MICRO}))


def split(batch: np.ndarray) -> np.ndarray:
    return batch.reshape(MICRO, -1, batch.shape[-1])


def test_accumulated_micro_batches_equal_one_batch(whole, in_parts, fresh_state):
    state, metrics = in_parts(fresh_state(), split(tokens(0)), jnp.int32(MICRO))
    close(state.params, whole.state.params)
    close(state.optimizer, whole.state.optimizer)
    close(state.bias, whole.state.bias)
    for name in ("loss", "mtp_loss", "sequence_aux", "grad_norm", "max_vio_layers"):
        np.testing.assert_allclose(metrics[name], whole.metrics[name], rtol=1e-4, err_msg=name)


def test_a_step_moves_every_parameter(whole, fresh_state):
    for before, after in zip(
        jax.tree.leaves(fresh_state().params), jax.tree.leaves(whole.state.params), strict=True
    ):
        assert not np.array_equal(before, after)
    assert int(whole.state.step) == 1


def test_padding_beyond_the_count_is_ignored(in_parts, fresh_state, same_bits):
    padded = [split(tokens(0)), split(tokens(0))]
    padded[0][2:], padded[1][2:] = 0, split(tokens(7))[2:]
    results = [in_parts(fresh_state(), batch, jnp.int32(2)) for batch in padded]
    assert same_bits(results[0], results[1])


def test_a_count_of_two_means_over_two(in_parts, fresh_state):
    few = split(tokens(0))
    twice = np.concatenate([few[:2], few[:2]])
    left, left_metrics = in_parts(fresh_state(), few, jnp.int32(2))
    right, right_metrics = in_parts(fresh_state(), twice, jnp.int32(MICRO))
    close(left.params, right.params)
    np.testing.assert_allclose(left_metrics["loss"], right_metrics["loss"], rtol=1e-5)
    doubled = 2 * left_metrics["max_vio_layers"]
    np.testing.assert_array_equal(doubled, right_metrics["max_vio_layers"])


def test_one_compilation_serves_all_counts(in_parts, fresh_state):
    for count in range(1, MICRO + 1):
        in_parts(fresh_state(), split(tokens(count)), jnp.int32(count))
    assert in_parts._cache_size() == 1


def biases(state: object) -> np.ndarray:
    """One row a MoE layer, then one a depth of MTP."""
    deeper = [state.bias["mtp"][k]["block"]["mlp"]["router"]["bias"] for k in state.bias["mtp"]]
    return np.concatenate([state.bias["moe"]["mlp"]["router"]["bias"], np.stack(deeper)])


def test_bias_moves_by_its_speed_towards_even_load_in_each_layer(whole, tiny_run):
    load, speed = np.asarray(whole.metrics["max_vio_layers"]), tiny_run().balance.bias_speed
    assert load.sum(axis=1).tolist() == [BATCH * 32 * 2] * 3
    expected = np.float32(speed) * np.sign(load.mean(axis=1, keepdims=True) - load)
    assert (expected != 0).any(axis=1).all()
    # No row could be mistaken for another.
    assert len({row.tobytes() for row in expected}) == 3
    np.testing.assert_array_equal(biases(whole.state), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_no_sum_depends_on_the_order_of_memory(tiny_run, precision):
    """A scatter that adds floats where several may meet gives other bits each time on a GPU."""
    widths = {"kv_lora_rank": 32, "qk_nope_dim": 16, "qk_rope_dim": 16, "v_dim": 16}
    run = tiny_run(precision=precision, model=widths)
    state = jax.eval_shape(lambda: module.initial_state(run))
    program = jax.make_jaxpr(build_step(run))(state, tokens(0)[None], jnp.int32(1))
    sums = [eqn for eqn in every(program.jaxpr) if eqn.primitive.name == "scatter-add"]
    floats = [eqn for eqn in sums if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)]
    assert sums
    assert all(eqn.params["unique_indices"] for eqn in floats)


def every(jaxpr) -> Iterator:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from every(inner)
