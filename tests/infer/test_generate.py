"""Text from a model: published greedy continuations, sampling, refusals, compilations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.hf import from_pretrained
from dsjax.infer import generate, stream
from dsjax.infer.generate import _bucket, _decode, _prefill
from dsjax.infer.sample import choose
from dsjax.model import Transformer
from tests.tiny import random_tokens, random_transformer

GOLDEN = Path(__file__).parents[1] / "golden"
CONTEXT, COUNT = 72, 7
SHAPE = {"layers": 1, "dense_layers": 0, "context": CONTEXT}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_transformer(**SHAPE)


@pytest.fixture(scope="module")
def prompts() -> np.ndarray:
    return np.asarray(random_tokens(3, 6, seed=1))


@pytest.mark.parametrize("name", ["v2_tiny", "v3_tiny", "v3_tiny_fp8"])
def test_greedy_text_is_that_of_the_published_format(name):
    expected = np.load(GOLDEN / name / "golden.npz", allow_pickle=False)
    published, greedy = from_pretrained(GOLDEN / name, "float32"), expected["greedy"]
    found = generate(published, expected["prompt"], greedy.shape[1])
    np.testing.assert_array_equal(found, greedy)


def test_greedy_text_is_the_argmax_of_the_full_forward(model, prompts):
    found = generate(model, prompts, COUNT)
    text = np.concatenate([prompts, found], axis=1)
    logits = np.asarray(jax.jit(lambda model, text: model(text))(model, text))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, logits[:, prompts.shape[1] - 1 : -1].argmax(axis=-1))


def test_a_batch_gives_what_each_prompt_gives_alone(model, prompts):
    together = generate(model, prompts, COUNT)
    assert together.shape == (3, COUNT)
    for prompt, expected in zip(prompts, together, strict=True):
        found = generate(model, prompt, COUNT)
        assert found.shape == (COUNT,)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_yields_what_generate_returns(model, prompts, temperature):
    steps = list(stream(model, prompts, COUNT, temperature, seed=5))
    whole = generate(model, prompts, COUNT, temperature, seed=5)
    assert [step.shape for step in steps] == [(3,)] * COUNT
    np.testing.assert_array_equal(np.stack(steps, axis=1), whole)


def test_seed_decides_the_text(model, prompts):
    first, again, other = (generate(model, prompts, COUNT, 1.0, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_rows_of_a_batch_and_steps_are_drawn_independently(model, prompts):
    same = np.repeat(prompts[:1], 3, axis=0)
    found = generate(model, same, COUNT, temperature=1e4)
    assert len({tuple(row) for row in found.tolist()}) == 3
    assert len(set(found[0, 1:].tolist())) > 1


def test_a_tiny_nucleus_is_greedy(model, prompts):
    narrow = generate(model, prompts, COUNT, temperature=1.0, top_p=1e-6, seed=9)
    np.testing.assert_array_equal(narrow, generate(model, prompts, COUNT))


def test_no_new_tokens_are_no_tokens(model, prompts):
    assert generate(model, prompts, 0).shape == (3, 0)
    assert generate(model, prompts[0], 0).shape == (0,)
    assert list(stream(model, prompts, 0)) == []


PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.18, 0.12])


def frequencies(temperature: float, top_p: float, draws: int = 20_000) -> np.ndarray:
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES)), (draws, 5))
    key = jax.random.key(0)
    found = jax.jit(choose)(logits, key, jnp.float32(temperature), jnp.float32(top_p))
    return np.bincount(np.asarray(found), minlength=5) / draws


@pytest.mark.parametrize(
    ("temperature", "top_p", "nucleus"),
    [
        (1.0, 1.0, [0, 1, 2, 3, 4]),
        (1.0, 0.9, [1, 2, 3, 4]),
        (1.0, 0.6, [1, 2]),
        (1.0, 0.66, [1, 2, 3]),
        (1.0, 0.3, [1]),
        (2.0, 1.0, [0, 1, 2, 3, 4]),
        (0.5, 0.9, [1, 2, 3]),
    ],
)
def test_draws_follow_the_nucleus(temperature, top_p, nucleus):
    """The nucleus is the smallest set of the likeliest tokens whose mass reaches top_p."""
    warm = PROBABILITIES ** (1 / temperature)
    expected = np.zeros(5)
    expected[nucleus] = warm[nucleus] / warm[nucleus].sum()
    found = frequencies(temperature, top_p)
    assert found[expected == 0].sum() == 0
    np.testing.assert_allclose(found, expected, atol=0.015)


def test_temperature_zero_takes_the_likeliest():
    assert frequencies(0.0, 1.0)[1] == 1


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"prompt_tokens": []}, r"\(1, 0\)"),
        ({"prompt_tokens": np.zeros((2, 0), np.int32)}, r"\(2, 0\)"),
        ({"prompt_tokens": [1.0, 2.0]}, "float64"),
        ({"prompt_tokens": np.zeros((1, 1, 4), np.int32)}, r"\(1, 1, 4\)"),
        ({"prompt_tokens": [1, 64]}, "64"),
        ({"prompt_tokens": [[1, 2], [3, -5]]}, "-5"),
        ({"max_new_tokens": -2}, "-2"),
        ({"max_new_tokens": 71}, "71"),
        ({"temperature": -0.5}, "-0.5"),
        ({"temperature": float("nan")}, "nan"),
        ({"top_p": 0.0}, "0.0"),
        ({"top_p": 1.5}, "1.5"),
        ({"top_p": float("nan")}, "nan"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_arguments_are_refused_at_once_and_named(model, function, arguments, shown):
    with pytest.raises(ValueError, match=shown):
        function(model, **({"prompt_tokens": [1, 2], "max_new_tokens": 4} | arguments))


def test_prompts_of_one_bucket_share_their_compiled_programs(model, prompts):
    generate(model, prompts[0, :2], 4)
    before = _prefill._cache_size(), _decode._cache_size()
    generate(model, prompts[1, :5], 9, temperature=0.7, top_p=0.9, seed=11)
    generate(random_transformer(seed=1, **SHAPE), prompts[2, :3], 5)
    assert (_prefill._cache_size(), _decode._cache_size()) == before
    whole_context = generate(model, prompts[0, :5], CONTEXT - 5)
    assert whole_context.shape == (CONTEXT - 5,)
    assert (_prefill._cache_size(), _decode._cache_size()) == (before[0] + 1, before[1] + 1)


def test_the_context_may_be_filled_but_not_exceeded(model, prompts):
    assert iter(stream(model, prompts[0, :5], CONTEXT - 5))
    with pytest.raises(ValueError, match=f"context of {CONTEXT}"):
        stream(model, prompts[0, :5], CONTEXT - 4)


@pytest.mark.parametrize(("length", "bucket"), [(1, 32), (32, 32), (33, 64), (64, 64), (65, 128)])
def test_lengths_are_rounded_up_to_powers_of_two(length, bucket):
    assert _bucket(length) == bucket
