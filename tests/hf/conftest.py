"""Tiny models and their files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsjax.config import Model, Yarn
from dsjax.hf.folder import Folder
from dsjax.model import Transformer
from tests.tiny import randomise

TINY = Model(
    vocab_size=96,
    dim=48,
    layers=3,
    dense_layers=1,
    heads=2,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_dim=12,
    qk_rope_dim=8,
    v_dim=20,
    dense_hidden=40,
    expert_hidden=24,
    experts=8,
    top_k=3,
    groups=4,
    top_groups=2,
    context=256,
    yarn=Yarn(factor=8.0, original_context=32),
    mtp_depth=0,
    init_std=0.2,
)


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parents[1] / "golden"


@pytest.fixture
def tiny() -> Model:
    return TINY


@pytest.fixture
def random_model() -> Callable[..., Transformer]:
    """Builds a random tiny model, given changes of the config; norms and biases are random too."""

    def build(seed: int = 0, dtype: str = "float32", **changes: object) -> Transformer:
        config = replace(TINY, **changes)
        abstract = nnx.eval_shape(
            lambda: Transformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))
        )
        return randomise(abstract, seed)

    return build


@pytest.fixture
def assert_same() -> Callable[[Path, Path], None]:
    """Checks that two checkpoints hold the same tensors, bit for bit."""

    def check(first: Path, second: Path) -> None:
        left, right = Folder(first), Folder(second)
        assert set(left) == set(right)
        for name in left:
            a, b = left[name], right[name]
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert a.tobytes() == b.tobytes(), name

    return check


@pytest.fixture
def tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 70), 0, TINY.vocab_size)
