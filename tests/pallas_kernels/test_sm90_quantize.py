"""The Hopper kernels of FP8 quantisation: interpreted, lowered for CUDA, and on a card."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    sm90_quantize,
    sm90_quantize_blocks,
    sm90_quantize_rmsnorm,
    sm90_quantize_transposed,
)
from pallas_kernels.quantize import (
    quantize_blocks,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
    requantize_transposed,
    rmsnorm_quantize,
    swiglu_quantize,
)
from tests.pallas_kernels.test_quantize import (
    GROUPS,
    assert_near,
    assert_same_bits,
    bits,
    draw,
    rows_of,
    scale_and_inverse,
)

SPECIAL = {"nan": np.nan, "inf": -np.inf, "huge": 3e38, "tiny": 1e-39}
NAN_SAFE = {"xla_cpu_experimental_ynn_fusion_type": ""}  # that library's maximum loses NaN
FLOATS = [jnp.bfloat16, jnp.float32]


def interpreted(kernel, *operands, capsys, **options):
    """Run on two CTAs (of one SM); fails on a race."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    kernel = functools.partial(kernel, sms=1, interpret=interpret, **options)
    found = jax.jit(kernel, compiler_options=NAN_SAFE)(*operands)
    jax.block_until_ready(found)
    assert "RACE" not in "".join(capsys.readouterr())
    return found


def reference(function, *operands, **options):
    """On the CPU also where there is a card."""
    with jax.default_device(jax.devices("cpu")[0]):
        operands = [None if x is None else jnp.asarray(np.asarray(x)) for x in operands]
        return function(*operands, backend="reference", **options)


def with_specials(x):
    """One special number in a tile of each of the first rows, and a row of zeros."""
    x = np.array(x, np.float32)
    for row, value in enumerate(SPECIAL.values()):
        x[2 * row, -1] = value
    x[9] = 0
    return x


@pytest.mark.parametrize(
    ("shape", "dtype", "power_of_two"),
    [
        ((257, 144), jnp.bfloat16, False),
        ((255, 272), jnp.bfloat16, True),
        ((131, 32), jnp.float32, False),
        ((1, 128), jnp.bfloat16, False),
    ],
)
def test_tiles(shape, dtype, power_of_two, capsys):
    x = draw(shape)
    x = jnp.asarray(with_specials(x) if shape[0] > 10 else x, dtype)
    found = interpreted(sm90_quantize.tiles, x, power_of_two=power_of_two, capsys=capsys)
    assert_same_bits(found, reference(quantize_tiles, x, power_of_two=power_of_two))


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks(dtype, capsys):
    w, options = draw((2, 130, 144), dtype), {"power_of_two": dtype == jnp.float32}
    found = interpreted(sm90_quantize_blocks.blocks, w, capsys=capsys, **options)
    assert_same_bits(found, reference(quantize_blocks, w, **options))


@pytest.mark.parametrize("shape", [(2, 144, 272), (1, 16, 128), (3, 128, 32)])
def test_blocks_both_ways(shape, capsys):
    w = draw(shape)
    found = interpreted(
        sm90_quantize_blocks.blocks, w, power_of_two=False, transposed=True, capsys=capsys
    )
    assert_same_bits(found, reference(quantize_blocks_both, w))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_swiglu(dtype, capsys):
    gate_up = draw((131, 2 * 144), dtype)
    found = interpreted(sm90_quantize.swiglu, gate_up, power_of_two=False, capsys=capsys)
    assert_near(found, reference(swiglu_quantize, gate_up))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 512), jnp.bfloat16), ((35, 1536), jnp.bfloat16), ((7, 144), jnp.float32)],
)
def test_rmsnorm(shape, dtype, capsys):
    x, weight = draw(shape, dtype), draw((1, shape[1]), seed=1)[0]
    kernel = sm90_quantize_rmsnorm.rmsnorm
    found = interpreted(kernel, x, weight, eps=1e-6, power_of_two=False, capsys=capsys)
    assert_near(found, reference(rmsnorm_quantize, x, weight, eps=1e-6))


@pytest.mark.parametrize(
    ("m", "k", "dtype", "power_of_two"),
    [(257, 144, jnp.bfloat16, False), (128, 128, jnp.bfloat16, True), (19, 16, jnp.float32, False)],
)
def test_both_without_groups(m, k, dtype, power_of_two, capsys):
    x = jnp.asarray(with_specials(draw((m, k))), dtype)
    kernel = sm90_quantize_transposed.both
    found = interpreted(kernel, x, None, power_of_two=power_of_two, capsys=capsys)
    expected = reference(quantize_both, x, power_of_two=power_of_two)
    assert_same_bits(found, expected)
    kernel = sm90_quantize_transposed.requantize
    found = interpreted(kernel, *expected[:2], None, power_of_two=power_of_two, capsys=capsys)
    again = reference(requantize_transposed, *expected[:2], power_of_two=power_of_two)
    assert_same_bits(found, again)
    kernel = sm90_quantize_transposed.transposed
    found = interpreted(kernel, x, None, power_of_two=power_of_two, capsys=capsys)
    assert_same_bits(found, expected[2:])


@pytest.mark.parametrize(
    "name",
    [
        "uneven",
        pytest.param("first and last empty", marks=pytest.mark.slow),
        pytest.param("rows left over", marks=pytest.mark.slow),
    ],
)
def test_groups(name, capsys):
    sizes = jnp.array(GROUPS[name], jnp.int32)
    x = draw((rows_of(GROUPS[name], name), 144), jnp.bfloat16)
    own = sum(GROUPS[name])
    kernel = sm90_quantize_transposed.both
    found = interpreted(kernel, x, sizes, power_of_two=False, capsys=capsys)
    expected = reference(quantize_both, x, sizes)
    assert_same_bits([a[:own] for a in found[:2]], [a[:own] for a in expected[:2]])
    assert_same_bits(found[2:], expected[2:])
    kernel = sm90_quantize_transposed.transposed
    found = interpreted(kernel, x, sizes, power_of_two=False, capsys=capsys)
    assert_same_bits(found, expected[2:])
    kernel = sm90_quantize_transposed.requantize
    found = interpreted(kernel, *expected[:2], sizes, power_of_two=False, capsys=capsys)
    assert_same_bits(found, reference(requantize_transposed, *expected[:2], sizes))


def test_nan_does_not_reach_the_next_group(capsys):
    x = np.array(draw((130, 16)))
    x[64, 5] = np.nan
    sizes = jnp.array([64, 66], jnp.int32)
    q, scale = reference(quantize_tiles, x)
    kernel = sm90_quantize_transposed.requantize
    found = interpreted(kernel, q, scale, sizes, power_of_two=False, capsys=capsys)
    assert_same_bits(found, reference(requantize_transposed, q, scale, sizes))
    assert np.isnan(np.asarray(found[1])).sum() == 16


def of_three(n, k, dtype):
    return jax.ShapeDtypeStruct((3, n, k), dtype)


KERNELS = {
    "tiles": lambda m, k, x: (sm90_quantize.tiles, [x]),
    "swiglu": lambda m, k, x: (sm90_quantize.swiglu, [jax.ShapeDtypeStruct((m, 2 * k), x.dtype)]),
    "blocks": lambda m, k, x: (sm90_quantize_blocks.blocks, [of_three(m, k, x.dtype)]),
    "blocks both ways": lambda m, k, x: (
        functools.partial(sm90_quantize_blocks.blocks, transposed=True),
        [of_three(-(-m // 16) * 16, k, x.dtype)],
    ),
    "transposed": lambda m, k, x: (
        functools.partial(sm90_quantize_transposed.transposed, sizes=None), [x]
    ),
    "both": lambda m, k, x: (functools.partial(sm90_quantize_transposed.both, sizes=None), [x]),
    "both by group": lambda m, k, x: (sm90_quantize_transposed.both, [x, GROUP_SIZES]),
    "requantize": lambda m, k, x: (
        functools.partial(sm90_quantize_transposed.requantize, sizes=None), quantized(m, k)
    ),
    "requantize by group": lambda m, k, x: (
        sm90_quantize_transposed.requantize, [*quantized(m, k), GROUP_SIZES]
    ),
    "rmsnorm": lambda m, k, x: (
        functools.partial(sm90_quantize_rmsnorm.rmsnorm, eps=1e-6),
        [x, jax.ShapeDtypeStruct((k,), jnp.float32)],
    ),
}  # fmt: skip
GROUP_SIZES = jax.ShapeDtypeStruct((5,), jnp.int32)


def quantized(m, k):
    q = jax.ShapeDtypeStruct((m, k), jnp.float8_e4m3fn)
    return [q, jax.ShapeDtypeStruct((m, -(-k // 128)), jnp.float32)]


@pytest.mark.parametrize(
    ("m", "k", "dtype"),
    [
        (130, 2000, jnp.bfloat16),
        pytest.param(1, 16, jnp.float32, marks=pytest.mark.slow),
        pytest.param(4097, 7168, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(8192, 7168, jnp.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", KERNELS)
def test_lowers_for_cuda(name, m, k, dtype):
    """The interpreter does not look at layouts, nor at how much shared memory there is."""
    kernel, operands = KERNELS[name](m, k, jax.ShapeDtypeStruct((m, k), dtype))
    kernel = functools.partial(kernel, power_of_two=True, sms=132)
    jax.jit(kernel).trace(*operands).lower(lowering_platforms=("cuda",))


def test_equal_calls_share_what_is_lowered():
    def twice(x):
        tiles = functools.partial(sm90_quantize.tiles, power_of_two=True, sms=132)
        return tiles(x), tiles(x + 1)

    x = jax.ShapeDtypeStruct((130, 256), jnp.bfloat16)
    lowered = jax.jit(twice).trace(x).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 1


def test_rmsnorm_lowers_at_its_limit():
    test_lowers_for_cuda("rmsnorm", 100, 16384, jnp.float32)


def on_card(function, *operands, rows=None, **options):
    """The kernel's result and the reference's, after the kernel has given it twice.

    Of `rows` rows: those behind the groups are not written.
    """
    run = jax.jit(functools.partial(function, backend="mosaic_gpu", **options))
    found, again = run(*operands), run(*operands)
    ends = (rows, rows, None, None)[: len(found)]
    assert_same_bits(
        [array[:end] for array, end in zip(again, ends, strict=True)],
        [array[:end] for array, end in zip(found, ends, strict=True)],
    )
    return found, reference(function, *operands, **options)


CARD_SHAPES = [(1, 32), (300, 1040), (133, 128), (1000, 7168), (4099, 2080)]
KINDS = [(jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float32, False)]
on_shapes = pytest.mark.parametrize("shape", CARD_SHAPES)
of_kinds = pytest.mark.parametrize(("dtype", "power_of_two"), KINDS)


@pytest.mark.gpu
@on_shapes
@of_kinds
def test_card_rows_and_columns(shape, dtype, power_of_two):
    x = draw(shape)
    x = jnp.asarray(with_specials(x) if shape[0] > 10 else x, dtype)
    assert_same_bits(*on_card(quantize_tiles, x, power_of_two=power_of_two))
    found, expected = on_card(quantize_both, x, power_of_two=power_of_two)
    assert_same_bits(found, expected)
    assert_same_bits(*on_card(requantize_transposed, *found[:2], power_of_two=power_of_two))
    assert_same_bits(on_card(quantize_transposed, x, power_of_two=power_of_two)[0], expected[2:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(16, 16), (2, 300, 1040), (3, 300, 128), (2, 304, 144), (3, 5, 576, 7168)]
)
@of_kinds
def test_card_blocks(shape, dtype, power_of_two):
    w = np.array(draw(shape))
    w[..., 3, 5] = np.nan
    w = jnp.asarray(w, dtype)
    assert_same_bits(*on_card(quantize_blocks, w, power_of_two=power_of_two))
    if shape[-2] % 16 == 0:
        assert_same_bits(*on_card(quantize_blocks_both, w, power_of_two=power_of_two))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [*((name, jnp.bfloat16, k) for name in GROUPS for k in (128, 144)),
     ("many", jnp.bfloat16, 2048), ("many", jnp.float32, 1040)],
)  # fmt: skip
def test_card_groups(name, dtype, k):
    sizes = GROUPS.get(name) or np.random.default_rng(0).integers(0, 400, 64).tolist()
    x = with_specials(draw((max(rows_of(sizes, name), 10), k)))[: rows_of(sizes, name)]
    counts, own = jnp.array(sizes, jnp.int32), sum(sizes)
    found, expected = on_card(quantize_both, jnp.asarray(x, dtype), counts, rows=own)
    assert_same_bits([a[:own] for a in found[:2]], [a[:own] for a in expected[:2]])
    assert_same_bits(found[2:], expected[2:])
    assert_same_bits(*on_card(requantize_transposed, *expected[:2], counts))
    assert_same_bits(*on_card(quantize_transposed, jnp.asarray(x, dtype), counts))


@pytest.mark.gpu
@on_shapes
@of_kinds
def test_card_swiglu_and_rmsnorm(shape, dtype, power_of_two):
    x, weight = draw(shape, dtype), draw((1, shape[1]), seed=1)[0]
    assert_near(*on_card(rmsnorm_quantize, x, weight, eps=1e-6, power_of_two=power_of_two))
    if shape[1] % 32 == 0:
        assert_near(*on_card(swiglu_quantize, x, power_of_two=power_of_two))


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
def test_card_scales_are_correctly_rounded(power_of_two):
    """The card's own division is not: 2**20 magnitudes, each a tile."""
    pattern = np.random.default_rng(0).integers(0x38000000, 0x7F800000, 1 << 20, np.uint32)
    amax = pattern.view(np.float32).reshape(-1, 8)
    x = np.zeros((*amax.shape, 128), np.float32)
    x[..., 77] = amax
    x[..., :64] = amax[..., None] * np.linspace(-1, 1, 64, dtype=np.float32)
    run = functools.partial(quantize_tiles, power_of_two=power_of_two, backend="mosaic_gpu")
    found = jax.jit(run)(jnp.asarray(x.reshape(-1, 1024)))
    scale, inverse = scale_and_inverse(amax, power_of_two)
    np.testing.assert_array_equal(found[1], scale)
    expected = (x * inverse[..., None]).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(bits(found[0]), bits(expected.reshape(-1, 1024)))
