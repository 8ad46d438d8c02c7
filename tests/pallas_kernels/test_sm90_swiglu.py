"""SwiGLU's Hopper kernels, both casts and the backward pass: interpreted, lowered, on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    gemm_backend,
    sm90_quantize,
    sm90_quantize_blocks,
    sm90_quantize_swiglu,
    sm90_quantize_transposed,
    sm90_swiglu_backward,
)
from pallas_kernels.fp8_recipe import V3, Recipe
from pallas_kernels.quantize import (
    dequantize,
    quantize_blocks,
    quantize_tiles,
    requantize_transposed,
    swiglu_quantize,
    swiglu_quantize_both,
)
from pallas_kernels.swiglu_backward import SwigluBackward, swiglu_backward
from tests.pallas_kernels.test_quantize import assert_near, assert_same_bits, draw
from tests.pallas_kernels.test_sm90_quantize import interpreted, reference, with_specials

FLOAT_STEPS = 4e-6


def assert_both(found, gate_up, power_of_two):
    """The product's cast near the reference's, gate_up's own of the same bits."""
    assert_near(found[0], reference(swiglu_quantize, gate_up, power_of_two=power_of_two))
    assert_same_bits(found[1], reference(quantize_tiles, gate_up, power_of_two=power_of_two))


@pytest.mark.parametrize(
    ("m", "f", "dtype", "power_of_two"),
    [
        (131, 256, jnp.bfloat16, False),
        (97, 384, jnp.bfloat16, True),
        (64, 128, jnp.float32, False),
        (1, 128, jnp.bfloat16, False),
    ],
)
def test_both(m, f, dtype, power_of_two, capsys):
    gate_up = draw((m, 2 * f), dtype)
    kernel = functools.partial(interpreted, power_of_two=power_of_two, capsys=capsys)
    found = kernel(sm90_quantize_swiglu.swiglu_both, gate_up)
    assert_both(found, gate_up, power_of_two)
    assert_same_bits(found[0], kernel(sm90_quantize.swiglu, gate_up))


@pytest.mark.parametrize("used", [0, 1, 33, 64, 97, 130])
def test_both_of_rows_that_are_used(used, capsys):
    """The others are NaN, and reading them would not matter."""
    gate_up = draw((97, 512), jnp.bfloat16).at[used:].set(jnp.nan)
    kernel = functools.partial(interpreted, power_of_two=False, capsys=capsys)
    found = kernel(sm90_quantize_swiglu.swiglu_both, gate_up, jnp.array([used], jnp.int32))
    every = kernel(sm90_quantize_swiglu.swiglu_both, gate_up)
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(every)
    assert_same_bits([x[:used] for x in found], [x[:used] for x in wanted])


def test_both_keeps_special_numbers_to_their_tiles(capsys):
    gate_up = jnp.asarray(with_specials(draw((40, 512))), jnp.bfloat16)
    kernel = functools.partial(interpreted, power_of_two=False, capsys=capsys)
    (_, h_scale), tiles = kernel(sm90_quantize_swiglu.swiglu_both, gate_up)
    assert_same_bits(tiles, reference(quantize_tiles, gate_up))
    # They are in up's last column: a NaN, an infinity and what overflows with a gate above 1.
    assert np.isnan(h_scale[:, 1]).tolist()[:4] == [True, False, True, False]
    assert np.isfinite(h_scale[5:]).all()
    assert np.isfinite(h_scale[:, 0]).all()


def draw_cache(m, f, seed=0):
    """gate_up's cache, d_h and weights."""
    rng = np.random.default_rng([seed, m, f])
    q, scale = reference(quantize_tiles, jnp.asarray(rng.normal(size=(m, 2 * f)) * 4, jnp.bfloat16))
    d_h = jnp.asarray(rng.normal(size=(m, f)), jnp.bfloat16)
    return q, scale, d_h, jnp.asarray(rng.uniform(-1, 1, m), jnp.float32)


def assert_gradients(found, *operands):
    """Near the reference's, and turned the very values that are found along the rows."""
    found, expected = SwigluBackward(*found), reference(swiglu_backward, *operands)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert_near_powers(one, other)
    sizes = operands[4]
    assert_same_bits(found.grad_t, turned_by_reference(found.grad, sizes))
    if expected.d_weights is None:
        assert found.d_weights is None
        return
    q, scale, d_h, _, _ = operands
    terms = np.asarray(d_h, np.float64) * silu_times(q, scale)
    error = np.abs(np.asarray(found.d_weights, np.float64) - terms.sum(axis=1))
    assert found.d_weights.shape == expected.d_weights.shape
    assert (error <= FLOAT_STEPS * np.abs(terms).sum(axis=1)).all()


def assert_near_powers(found, expected):
    """`assert_near`, but a tile whose largest value lies at a power's edge may take the next."""
    ratio = np.asarray(found[1]) / np.asarray(expected[1])
    assert np.isin(ratio, [0.5, 1, 2]).all()
    assert np.mean(ratio != 1) <= 1e-4
    one, other = (np.asarray(dequantize(*x, jnp.float32, block_rows=1)) for x in (found, expected))
    least = 2.0**-8 * np.repeat(np.asarray(expected[1]), 128, axis=1)[:, : one.shape[1]]
    assert (np.abs(one - other) <= 0.126 * np.abs(other) + least).all()
    assert np.mean(one != other) <= 1e-2


def turned_by_reference(pair, sizes):
    return reference(requantize_transposed, *pair, sizes, power_of_two=True)


def silu_times(q, scale):
    true = np.asarray(q, np.float64) * np.repeat(np.asarray(scale, np.float64), 128, axis=1)
    gate, up = np.split(true, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize(
    ("m", "f", "weighted", "sizes"),
    [
        (131, 256, True, None),
        (129, 128, False, None),
        (1, 128, True, None),
        (300, 128, True, (100, 0, 150, 50)),
        pytest.param(150, 256, False, (7, 143), marks=pytest.mark.slow),
    ],
)
def test_backward(m, f, weighted, sizes, capsys):
    *operands, weights = draw_cache(m, f)
    operands += [weights if weighted else None, None if sizes is None else jnp.int32(sizes)]
    found = interpreted(sm90_swiglu_backward.backward, *operands, capsys=capsys)
    assert_gradients(found, *operands)


def test_backward_in_slabs_of_other_heights(capsys):
    operands = [*draw_cache(140, 128), None]
    kernel = functools.partial(interpreted, sm90_swiglu_backward.backward, *operands)
    expected = jax.tree.leaves(kernel(capsys=capsys))
    for rows, stages in ((32, 3), (8, 2)):
        found = jax.tree.leaves(kernel(rows=rows, stages=stages, capsys=capsys))
        assert_same_bits(found[:6], expected[:6])


def test_backward_keeps_nan_to_its_group_and_to_rows_of_groups(capsys):
    """Rows 20 to 39 are the second group's; those behind are no group's."""
    q, scale, d_h, weights = draw_cache(50, 128)
    d_h, weights = d_h.at[17, 100].set(np.nan), weights.at[40:].set(np.nan)
    operands = [q, scale.at[45].set(np.nan), d_h, weights, jnp.int32([20, 20])]
    found = SwigluBackward(*interpreted(sm90_swiglu_backward.backward, *operands, capsys=capsys))
    assert np.flatnonzero(np.isnan(found.grad[1][:40]).any(axis=1)).tolist() == [17]
    assert np.flatnonzero(np.isnan(found.d_weights[:40])).tolist() == [17]
    for _, turned_scale in (found.grad_t, found.h_t):
        assert np.isfinite(np.asarray(turned_scale)[:, 1:]).all()
    own = [x[20:40] for x in operands[:4]]
    alone = SwigluBackward(*interpreted(sm90_swiglu_backward.backward, *own, None, capsys=capsys))
    assert_same_bits([x[20:40] for x in found.grad], alone.grad)
    assert_same_bits([x[:, 128:256] for x in (found.grad_t[0], found.h_t[0])],
                     [alone.grad_t[0], alone.h_t[0]])  # fmt: skip


def shapes(m, f, dtype=jnp.bfloat16):
    of = jax.ShapeDtypeStruct
    cache = [of((m, 2 * f), jnp.float8_e4m3fn), of((m, f // 64), jnp.float32)]
    sizes = of((7,), jnp.int32)
    return of((m, 2 * f), dtype), [*cache, of((m, f), jnp.bfloat16), of((m,), jnp.float32), sizes]


@pytest.mark.parametrize(
    ("m", "f", "dtype"),
    [(130, 1408, jnp.bfloat16), (1, 128, jnp.float32), (8192, 2048, jnp.float32)],
)
def test_both_lowers_for_cuda(m, f, dtype):
    both = functools.partial(sm90_quantize_swiglu.swiglu_both, power_of_two=True, sms=132)
    jax.jit(both).trace(shapes(m, f, dtype)[0]).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("m", "f", "count"), [(130, 1408, 5), (1, 128, 3)])
def test_backward_lowers_for_cuda(m, f, count):
    """With weights and groups, and with neither."""
    operands = [*shapes(m, f)[1][:count], *[None] * (5 - count)]
    back = functools.partial(sm90_swiglu_backward.backward, sms=132)
    jax.jit(back).trace(*operands).lower(lowering_platforms=("cuda",))


def recorded(calls, name, function):
    """`function` without its options, for a kernel of that name."""

    def call(*operands, **options):
        calls.append(name)
        return function(*operands)

    return call


def on_cpu(function):
    return functools.partial(function, backend="reference")


@pytest.mark.parametrize(
    ("m", "f", "expected"),
    [(3, 256, ["both"]), (3, 144, ["swiglu", "tiles"]), (0, 256, [])],
)
def test_both_takes_whole_tiles(m, f, expected, monkeypatch):
    """And the kernels of either cast where a tile holds gate and up."""
    calls = []
    monkeypatch.setattr(gemm_backend, "is_hopper", lambda: True)
    for module, name, function in (
        (sm90_quantize_swiglu, "swiglu_both", swiglu_quantize_both),
        (sm90_quantize, "swiglu", swiglu_quantize),
        (sm90_quantize, "tiles", quantize_tiles),
    ):
        stand_in = recorded(calls, name.removeprefix("swiglu_"), on_cpu(function))
        monkeypatch.setattr(module, name, stand_in)
    gate_up = draw((m, 2 * f), jnp.bfloat16)
    product, tiles = swiglu_quantize_both(gate_up)
    assert calls == expected
    assert_same_bits(product, reference(swiglu_quantize, gate_up))
    assert_same_bits(tiles, reference(quantize_tiles, gate_up))


@pytest.mark.parametrize(
    ("m", "f", "dtype", "recipe", "expected"),
    [
        (3, 256, jnp.bfloat16, V3, ["backward"]),
        (3, 256, jnp.float32, V3, []),
        (3, 144, jnp.bfloat16, V3, []),
        (0, 256, jnp.bfloat16, V3, []),
        (3, 256, jnp.bfloat16, Recipe(gradient_blocks=True), []),
    ],
)
def test_backward_takes_bfloat16_and_whole_tiles(m, f, dtype, recipe, expected, monkeypatch):
    calls = []
    for module, name, function in (
        (sm90_quantize_transposed, "requantize", requantize_transposed),
        (sm90_quantize, "tiles", quantize_tiles),
        (sm90_quantize_blocks, "blocks", quantize_blocks),
    ):
        stand_in = recorded([], name, functools.partial(on_cpu(function), power_of_two=True))
        monkeypatch.setattr(module, name, stand_in)
    stand_in = recorded(calls, "backward", on_cpu(swiglu_backward))
    monkeypatch.setattr(sm90_swiglu_backward, "backward", stand_in)
    monkeypatch.setattr(gemm_backend, "is_hopper", lambda: True)
    q, scale, d_h, weights = draw_cache(m, f)
    run = functools.partial(swiglu_backward, q, scale, d_h.astype(dtype), weights, recipe=recipe)
    found = run()
    assert calls == expected
    assert_same_bits(jax.tree.leaves(found), jax.tree.leaves(run(backend="reference")))


def test_backward_refuses():
    q, scale, d_h, weights = draw_cache(3, 256)
    with pytest.raises(ValueError, match="weights"):
        swiglu_backward(q, scale, d_h, weights[:2])
    with pytest.raises(ValueError, match="group_sizes"):
        swiglu_backward(q, scale, d_h, weights, jnp.zeros(2))
    with pytest.raises(ValueError, match="2F is 3"):
        swiglu_backward(q[:, :3], scale[:, :1], d_h)


def test_both_refuses():
    with pytest.raises(ValueError, match="2F is 3"):
        swiglu_quantize_both(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="float16"):
        swiglu_quantize_both(jnp.zeros((2, 4), jnp.float16))
    with pytest.raises(ValueError, match="used"):
        swiglu_quantize_both(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match="not differentiable"):
        jax.grad(lambda x: swiglu_quantize_both(x)[0][1].sum())(jnp.ones((2, 256)))


CARD_SHAPES = [(1, 128), (300, 1408), (1000, 2048), (4099, 256), (20000, 384)]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "f"), CARD_SHAPES)
@pytest.mark.parametrize(
    ("dtype", "power_of_two"),
    [(jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float32, False)],
)
def test_card_both(m, f, dtype, power_of_two):
    """The bits of either cast's own kernel, and again."""
    x = draw((m, 2 * f))
    gate_up = jnp.asarray(with_specials(x) if m > 10 else x, dtype)

    def run(function):
        options = dict(backend="mosaic_gpu", power_of_two=power_of_two)
        return jax.jit(functools.partial(function, **options))(gate_up)

    product, tiles = run(swiglu_quantize_both)
    assert_same_bits(product, run(swiglu_quantize))
    assert_same_bits(tiles, run(quantize_tiles))
    again = run(swiglu_quantize_both)
    assert_same_bits([*again[0], *again[1]], [*product, *tiles])
    some = jnp.array([m // 3], jnp.int32)
    of_some = run(functools.partial(swiglu_quantize_both, used=some))
    found, wanted = jax.tree.leaves(of_some), jax.tree.leaves((product, tiles))
    assert_same_bits([x[: m // 3] for x in found], [x[: m // 3] for x in wanted])


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "f"), CARD_SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("groups", [0, 7])
def test_card_backward(m, f, weighted, groups):
    q, scale, d_h, weights = draw_cache(m, f)
    shares = np.random.default_rng(m).multinomial(m, np.ones(groups) / groups) if groups else None
    sizes = None if shares is None else jnp.asarray(shares, jnp.int32)
    operands = q, scale, d_h, weights if weighted else None, sizes
    run = jax.jit(sm90_swiglu_backward.backward)
    found = run(*operands)
    assert_gradients(found, *operands)
    for _ in range(3):
        assert_same_bits(jax.tree.leaves(run(*operands)), jax.tree.leaves(found))


@pytest.mark.gpu
def test_card_without_rows():
    product, tiles = swiglu_quantize_both(jnp.zeros((0, 512), jnp.bfloat16), backend="mosaic_gpu")
    assert product[1].shape == (0, 2)
    assert tiles[1].shape == (0, 4)
    q, scale, d_h, weights = draw_cache(0, 256)
    found = swiglu_backward(q, scale, d_h, weights, backend="mosaic_gpu")
    assert found.d_weights is not None
    assert found.d_weights.shape == (0,)
