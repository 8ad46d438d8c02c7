"""Random models small enough to compile in a second."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import Model
from dsjax.model import RouterBias, Transformer

CONFIG = Model(
    vocab_size=64,
    dim=32,
    layers=3,
    dense_layers=1,
    heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_dim=8,
    qk_rope_dim=4,
    v_dim=8,
    dense_hidden=48,
    expert_hidden=16,
    experts=8,
    top_k=2,
    groups=4,
    top_groups=2,
    context=128,
    yarn=None,
    mtp_depth=0,
    init_std=0.2,
)


def randomise(module: nnx.Module, seed: int = 0) -> nnx.Module:
    """The (abstract) module with random arrays; norms and router biases are random too."""
    generator = np.random.default_rng(seed)
    graph, state = nnx.split(module)
    drawn = []
    for path, leaf in nnx.to_flat_state(state):
        values = generator.standard_normal(leaf.shape)
        if isinstance(leaf, RouterBias):
            # Mostly negative affinities: groups masked with 0 instead of -inf would win.
            values = 0.2 * values - 0.7
        elif "norm" in str(path[-1]):
            values = 1 + 0.3 * values
        else:
            values = CONFIG.init_std * values
        drawn.append((path, leaf.replace(jnp.asarray(values, leaf.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(drawn))


def random_transformer(seed: int = 0, precision: str = "fp32", **changes: object) -> Transformer:
    config = replace(CONFIG, **changes)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), precision=precision))
    return randomise(abstract, seed)


def random_tokens(batch: int, time: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, time), 0, CONFIG.vocab_size)
