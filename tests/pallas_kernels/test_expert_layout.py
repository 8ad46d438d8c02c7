"""Rows of tokens on the rank of their experts: against a loop, and the kernel on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import sm90_expert_layout as kernel
from pallas_kernels.expert_layout import ExpertLayout, count_along, expert_layout, place
from pallas_kernels.sm90_peers import OneCard, Peers


def by_loop(choices: np.ndarray, first: int, experts: int) -> ExpertLayout:
    """choices [S, k], of all ranks."""
    slots, tokens, sizes, row = np.full_like(choices, -1), [], [], 0
    for expert in range(first, first + experts):
        found = np.argwhere(choices == expert)
        sizes.append(len(found))
        for token, j in found:
            slots[token, j] = row
            row += 1
    tokens = np.flatnonzero((slots >= 0).any(axis=1))
    return ExpertLayout(slots, np.array(sizes), tokens, np.array([len(tokens)]))


def draw(tokens: int, k: int, experts: int, kind: str = "random", seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    scores = generator.random((tokens, experts))
    if kind == "all to one":
        scores = scores[:1] + np.zeros((tokens, 1))
    if kind == "empty ranks":
        scores[:, : experts // 2] = 0
    found = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    if kind == "some missing":
        found[generator.random(found.shape) < 0.3] = -1
    return found


KINDS = "random", "all to one", "empty ranks", "some missing"


def assert_same(found: ExpertLayout, expected: ExpertLayout) -> None:
    count = int(expected.count[0])
    np.testing.assert_array_equal(found.slots, expected.slots)
    np.testing.assert_array_equal(found.sizes, expected.sizes)
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_array_equal(np.asarray(found.tokens)[:count], expected.tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "k", "experts"), [(40, 2, 8), (300, 3, 12), (1, 1, 4)])
def test_places_are_those_of_a_loop(tokens, k, experts, kind):
    choices, here = draw(tokens, k, experts, kind), experts // 4
    for first in range(0, experts, here):
        found = jax.jit(place, static_argnums=2)(choices, first, here)
        assert_same(found, by_loop(choices, first, here))


def test_counts_are_exact_beyond_what_bfloat16_holds():
    everything = np.ones((20000, 2), bool)
    np.testing.assert_array_equal(count_along(everything)[:, 0], np.arange(1, 20001))


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_every_rank_has_the_layout_of_its_experts():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    choices = draw(8 * 5, 3, 16)
    run = jax.shard_map(
        functools.partial(expert_layout, experts=2, axis="x"), mesh=mesh, in_specs=P("x"),
        out_specs=P("x"), check_vma=False,
    )  # fmt: skip
    found = [np.split(np.asarray(leaf), 8) for leaf in jax.jit(run)(choices)]
    for rank, layout in enumerate(zip(*found, strict=True)):
        assert_same(ExpertLayout(*layout), by_loop(choices, 2 * rank, 2))


def test_refusals():
    choices = jnp.zeros((4, 2), jnp.int32)
    with pytest.raises(ValueError, match="experts is 0: expected 1"):
        expert_layout(choices, 0, axis="x")
    with pytest.raises(ValueError, match=r"experts_TK is float32 .* expected int32 \[T, k\]"):
        expert_layout(choices.astype(jnp.float32), 2, axis="x")


@pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")
def test_the_kernel_is_lowered_for_cuda():
    mesh = jax.make_mesh((2, 4), ("data", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(choices):
        return kernel.layout(choices, count=64, peers=Peers.along("x"))

    spread = P(("data", "x"))
    run = jax.shard_map(run, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False)
    choices = jax.ShapeDtypeStruct((8 * 256, 8), jnp.int32)
    text = jax.jit(run).trace(choices).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert kernel.fits(256, 8, 64, 4)
    assert not kernel.fits(250, 8, 64, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ranks", "tokens", "k", "experts"),
    [(4, 4096, 8, 256), (2, 128, 1, 4), (8, 8192, 8, 256), (1, 256, 6, 160), (4, 512, 3, 64)],
)
def test_the_kernel_counts_as_a_loop_does(ranks, tokens, k, experts, kind):
    """Ranks side by side on one card. Twice: nothing is left over from the first time."""
    choices, here = draw(ranks * tokens, k, experts, kind), experts // ranks
    run = jax.jit(functools.partial(kernel.layout, count=here, peers=OneCard(ranks)))
    for _ in range(2):
        found = run(choices.reshape(ranks, tokens, k))
    for rank in range(ranks):
        own = ExpertLayout(*(np.asarray(leaf[rank]) for leaf in found))
        assert_same(own, by_loop(choices, rank * here, here))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpus_count_as_a_loop_does(kind):
    ranks, tokens, k, experts = jax.device_count(), 4096, 8, 256
    mesh = jax.make_mesh((ranks,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    choices, here = draw(ranks * tokens, k, experts, kind), experts // ranks
    run = jax.shard_map(
        functools.partial(expert_layout, experts=here, axis="x", backend="mosaic_gpu"),
        mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False,
    )  # fmt: skip
    for _ in range(2):
        found = [np.split(np.asarray(leaf), ranks) for leaf in jax.jit(run)(choices)]
    for rank, layout in enumerate(zip(*found, strict=True)):
        assert_same(ExpertLayout(*layout), by_loop(choices, rank * here, here))
