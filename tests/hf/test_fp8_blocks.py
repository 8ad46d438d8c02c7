"""FP8 blocks: shapes, clipping, exact return of stored bits."""

import ml_dtypes
import numpy as np
import pytest

from dsjax.hf import fp8


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (0.05 * generator.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("shape", [(576, 300), (1, 1), (128, 256), (129, 5)])
def test_error_is_at_most_half_a_step(shape):
    weight = weights(shape)
    bits, scales = fp8.quantise(weight)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    each = scales.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    error = np.abs(fp8.dequantise(bits, scales) - weight)
    # Three bits of mantissa; below 2^-6 the steps are 2^-9.
    assert (error <= np.maximum(np.abs(weight) * 2**-4, each * 2**-10) * 1.0001).all()
    np.testing.assert_allclose(np.abs(bits.astype(np.float32)).max(), 448)


def test_scale_of_each_block_multiplies():
    bits = np.ones((130, 260), fp8.E4M3)
    scales = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    found = fp8.dequantise(bits, scales, ml_dtypes.bfloat16)
    assert found.dtype == ml_dtypes.bfloat16
    assert found[127, 127] == 1
    assert found[127, 128] == 2
    assert found[128, 259] == 6


def test_values_beyond_the_scale_are_clipped():
    bits, _ = fp8.quantise(np.float32([[1e4, -1e4]]), np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(bits.astype(np.float32), [[448, -448]])


def test_zero_block_has_the_smallest_scale():
    bits, scales = fp8.quantise(np.zeros((128, 128), np.float32))
    np.testing.assert_allclose(scales, 1e-4 / 448)
    assert not bits.astype(np.float32).any()


def test_power_of_two_scales_are_never_too_small():
    weight = weights((200, 200))
    plain, rounded = fp8.fresh_scales(weight), fp8.fresh_scales(weight, power_of_two=True)
    assert (np.frexp(rounded)[0] == 0.5).all()
    assert ((plain <= rounded) & (rounded < 2 * plain)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_stored_scales_give_back_every_bit(dtype):
    """All 254 finite codes under arbitrary scales, whatever made them."""
    generator = np.random.default_rng(1)
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    bits = generator.choice(codes, (300, 200)).view(fp8.E4M3)
    scales = generator.uniform(1e-6, 3e-3, (3, 2)).astype(np.float32)
    loaded = fp8.dequantise(bits, scales, dtype)
    again, same = fp8.requantise(loaded, scales)
    assert again.tobytes() == bits.tobytes()
    assert same.tobytes() == scales.tobytes()


def test_a_changed_block_alone_gets_a_new_scale():
    bits, scales = fp8.quantise(weights((300, 200)))
    loaded = fp8.dequantise(bits, scales)
    loaded[150, 150] *= 1.7
    again, found = fp8.requantise(loaded, scales)
    assert [tuple(i) for i in np.argwhere(found != scales)] in ([], [(1, 1)])
    np.testing.assert_array_equal(again[:128], bits[:128])
    loaded[150, 150] = 99
    assert fp8.requantise(loaded, scales)[1][1, 1] == np.float32(99) / np.float32(448)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"scales are \(1, 1\) .*expected \(2, 1\)"):
        fp8.dequantise(np.ones((129, 2), fp8.E4M3), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="weight is float32"):
        fp8.dequantise(np.ones((2, 2), np.float32), np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="NaN or infinity"):
        fp8.quantise(np.full((2, 2), np.nan, np.float32))
