"""SwiGLU's Hopper kernels, both casts and the backward pass: interpreted, lowered, on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    gemm_backend,
    quantize,
    sm90_quantize,
    sm90_quantize_swiglu,
    sm90_quantize_transposed,
    sm90_swiglu_backward,
    swiglu_backward,
)
from pallas_kernels.quantize import (
    dequantize,
    quantize_tiles,
    swiglu_quantize,
    swiglu_quantize_both,
)
from tests.pallas_kernels.test_quantize import assert_near, assert_same_bits, draw
from tests.pallas_kernels.test_sm90_quantize import interpreted, reference, with_specials

BF16_ROUNDING, FLOAT_STEPS = 2.0**-8, 4e-6


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


def assert_gradients(found, q, scale, d_h, weights):
    """Within a rounding to bfloat16, and the weights' gradient within float32's sums."""
    true = np.asarray(q, np.float64) * np.repeat(np.asarray(scale, np.float64), 128, axis=1)
    gate, up = np.split(true, 2, axis=1)
    d_h = np.asarray(d_h, np.float64)
    weight = 1 if weights is None else np.asarray(weights, np.float64)[:, None]
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    d_product = d_h * weight
    d_gate = d_product * up * (sigmoid + silu * (1 - sigmoid))
    (grad, h, d_weights), f = found, d_h.shape[1]
    assert grad.dtype == h.dtype == jnp.bfloat16
    assert_rounded(grad[:, :f], d_gate, np.abs(d_product * up))
    assert_rounded(grad[:, f:], d_product * silu)
    assert_rounded(h, silu * up * weight)
    if weights is None:
        assert d_weights is None
        return
    terms = d_h * silu * up
    error = np.abs(np.asarray(d_weights, np.float64) - terms.sum(axis=1))
    assert d_weights.shape == weights.shape
    assert (error <= FLOAT_STEPS * np.abs(terms).sum(axis=1)).all()


def assert_rounded(found, true, terms=0):
    """To bfloat16, from a float32 sum of terms of about that size."""
    assert found.shape == true.shape
    allowed = BF16_ROUNDING * np.abs(true) + FLOAT_STEPS * np.maximum(np.abs(true), terms)
    assert (np.abs(np.asarray(found, np.float64) - true) <= allowed).all()


@pytest.mark.parametrize(
    ("m", "f", "weighted"), [(131, 256, True), (129, 256, False), (1, 128, True), (64, 128, True)]
)
def test_backward(m, f, weighted, capsys):
    *operands, weights = draw_cache(m, f)
    operands.append(weights if weighted else None)
    found = interpreted(sm90_swiglu_backward.backward, *operands, capsys=capsys)
    assert_gradients(found, *operands)


def test_backward_keeps_nan_to_its_row(capsys):
    q, scale, d_h, weights = draw_cache(40, 256)
    operands = [q, scale.at[3, 0].set(np.nan), d_h.at[17, 200].set(np.nan), weights]
    operands[-1] = weights.at[30].set(np.nan)
    found = interpreted(sm90_swiglu_backward.backward, *operands, capsys=capsys)
    rows = [np.isnan(np.asarray(x, np.float32)).reshape(40, -1).any(1) for x in found]
    assert [np.flatnonzero(x).tolist() for x in rows] == [[3, 17, 30], [3, 30], [3, 17]]
    whole = np.delete(np.arange(40), [3, 17, 30])
    kept = [x[whole] for x in (q, scale, d_h, weights)]
    assert_gradients([x[whole] for x in found], *kept)


def shapes(m, f, dtype=jnp.bfloat16):
    of = jax.ShapeDtypeStruct
    cache = [of((m, 2 * f), jnp.float8_e4m3fn), of((m, f // 64), jnp.float32)]
    return of((m, 2 * f), dtype), [*cache, of((m, f), jnp.bfloat16), of((m,), jnp.float32)]


@pytest.mark.parametrize(
    ("m", "f", "dtype"),
    [(130, 1408, jnp.bfloat16), (1, 128, jnp.float32), (8192, 2048, jnp.float32)],
)
def test_lowers_for_cuda(m, f, dtype):
    gate_up, operands = shapes(m, f, dtype)
    both = functools.partial(sm90_quantize_swiglu.swiglu_both, power_of_two=True, sms=132)
    back = functools.partial(sm90_swiglu_backward.backward, sms=132)
    jax.jit(both).trace(gate_up).lower(lowering_platforms=("cuda",))
    jax.jit(back).trace(*operands).lower(lowering_platforms=("cuda",))
    jax.jit(lambda *x: back(*x, None)).trace(*operands[:3]).lower(lowering_platforms=("cuda",))


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
    ("m", "f", "dtype", "expected"),
    [
        (3, 256, jnp.bfloat16, ["backward"]),
        (3, 256, jnp.float32, []),
        (3, 144, jnp.bfloat16, []),
        (0, 256, jnp.bfloat16, []),
    ],
)
def test_backward_takes_bfloat16_and_whole_tiles(m, f, dtype, expected, monkeypatch):
    calls = []
    for name in ("both", "transposed"):
        kind = getattr(quantize, f"quantize_{name}")
        monkeypatch.setattr(sm90_quantize_transposed, name, recorded([], name, on_cpu(kind)))
    stand_in = recorded(calls, "backward", by_jnp)
    monkeypatch.setattr(sm90_swiglu_backward, "backward", stand_in)
    monkeypatch.setattr(gemm_backend, "is_hopper", lambda: True)
    q, scale, d_h, weights = draw_cache(m, f)
    run = swiglu_backward.swiglu_backward
    found = run(q, scale, d_h.astype(dtype), weights)
    assert calls == expected
    wanted = run(q, scale, d_h.astype(dtype), weights, backend="reference")
    assert_same_bits(jax.tree.leaves(found), jax.tree.leaves(wanted))


def test_both_refuses():
    with pytest.raises(ValueError, match="2F is 3"):
        swiglu_quantize_both(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="float16"):
        swiglu_quantize_both(jnp.zeros((2, 4), jnp.float16))
    with pytest.raises(TypeError, match="not differentiable"):
        jax.grad(lambda x: swiglu_quantize_both(x)[0][1].sum())(jnp.ones((2, 256)))


def by_jnp(q, scale, d_h, weights):
    return swiglu_backward._backward(dequantize(q, scale, jnp.float32), d_h, weights)


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


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "f"), CARD_SHAPES)
@pytest.mark.parametrize("weighted", [True, False])
def test_card_backward(m, f, weighted):
    q, scale, d_h, weights = draw_cache(m, f)
    operands = q, scale, d_h, weights if weighted else None
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
    run = swiglu_backward.swiglu_backward
    found = run(q, scale, d_h, weights, backend="mosaic_gpu")
    assert found.d_weights is not None
    assert found.d_weights.shape == (0,)
