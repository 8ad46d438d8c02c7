"""The alignment of MTP, the weights of the parts, and what passes gradients."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Balance
from dsjax.model import RouterBias, Transformer
from dsjax.train.loss import Losses, losses, objective
from dsjax.train.step import initial_state, model_of
from tests.train.conftest import draw_state

P, B, T = 11, 2, 12


class Oracle:
    """Predicts token i + depth + 1 from the embeddings it is given, in a cyclic vocabulary.

    If depth k is given the token k later at each place, the token it must predict is one more.
    """

    def __init__(self, depth: int):
        self.config = SimpleNamespace(mtp_depth=depth, vocab_size=P)
        self.head = 50.0 * jnp.eye(P)
        self.seen: list[np.ndarray] = []

    def hidden(self, tokens, placement, remat):
        return jax.nn.one_hot((tokens + 1) % P, P), None

    def predict_further(self, hidden, following, placement):
        self.seen = [np.asarray(tokens) for tokens in following]
        return [jax.nn.one_hot((tokens + 1) % P, P) for tokens in following], None


def counting(extra: int = 0) -> jax.Array:
    """Rows that count upwards, so that the next token is always one more."""
    return (jnp.arange(T + 1)[None] + jnp.arange(B)[:, None] + extra) % P


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_k_sees_the_token_k_later_and_predicts_the_one_after(depth):
    oracle, sequences = Oracle(depth), counting()
    parts = losses(oracle, sequences)
    assert float(parts.main) < 1e-6
    assert float(parts.mtp) < 1e-6
    for k, seen in enumerate(oracle.seen, start=1):
        np.testing.assert_array_equal(seen[:, : T - k + 1], sequences[:, k : T + 1])


@pytest.mark.parametrize("wrong_at", [T - 1, T])
def test_every_known_target_of_mtp_counts_once(wrong_at):
    sequences = counting().at[0, wrong_at].add(3) % P
    # A wrong token is missed as a target and, inside the sequence, misleads the one after it.
    misses = 1 if wrong_at == T else 2
    assert float(losses(Oracle(1), sequences).mtp) == pytest.approx(50 * misses / B / (T - 1))


def test_mean_of_mtp_leaves_out_what_wraps_around():
    # The first token is the only one that wraps around into the targets of depth 1.
    sequences = counting().at[:, 0].add(5) % P
    assert float(losses(Oracle(1), sequences).mtp) < 1e-6


@pytest.fixture(scope="module")
def model(tiny_run) -> Transformer:
    run = tiny_run(model={"layers": 1})
    state = jax.tree.map(jnp.asarray, draw_state(run))
    return model_of(run, state.params, state.bias)


def test_mtp_loss_equals_its_recomputation_from_the_models_parts(model):
    sequences = jax.random.randint(jax.random.key(1), (2, 10), 0, model.config.vocab_size)
    graph, state = nnx.split(model)

    @jax.jit
    def both(state: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        hidden, _ = model.hidden(sequences[:, :-1])
        # Eight places know both the token one later and the token two later.
        (further,), _ = model.predict_further(hidden, sequences[None, :, 1:])
        chances = jax.nn.log_softmax(model.logits(further))[:, :8]
        expected = -jnp.take_along_axis(chances, sequences[:, 2:, None], axis=-1).mean()
        return losses(model, sequences).mtp, expected

    np.testing.assert_allclose(*both(state), rtol=1e-5)


def test_objective_weighs_its_parts():
    parts = Losses(*[jnp.float32(x) for x in (1, 10, 100, 1000)], jnp.zeros((0, 1), jnp.int32))
    balance = Balance(sequence_aux=0.5, batch_aux=0.25)
    assert float(objective(parts, balance, jnp.float32(0.3))) == pytest.approx(1 + 3 + 50 + 250)


def test_router_bias_is_no_parameter_and_gets_no_gradient(model, tiny_run):
    sequences = jax.random.randint(jax.random.key(1), (2, 10), 0, model.config.vocab_size)
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)

    @jax.jit
    @jax.grad
    def gradient(bias: nnx.State) -> jax.Array:
        parts = losses(nnx.merge(graph, params, bias), sequences)
        return objective(parts, Balance(sequence_aux=1.0, batch_aux=1.0), jnp.float32(1.0))

    leaves = jax.tree.leaves(gradient(bias))
    assert len(leaves) == 2
    assert not any(leaf.any() for leaf in leaves)
    state = jax.eval_shape(lambda: initial_state(tiny_run()))
    assert "bias" not in jax.tree_util.keystr(
        tuple(key for path, _ in jax.tree_util.tree_leaves_with_path(state.params) for key in path)
    )
    assert len(jax.tree.leaves(state.bias)) == 2
