"""FP8 as published: e4m3 weights with one float32 scale for each block of 128 x 128.

A scale multiplies, although its name ends in `_scale_inv`; blocks at the edges are cut off, so
scales have ceil-divided shape. Work goes in bands of 128 rows, which keeps temporaries small.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float

BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448)
_SMALLEST_AMAX = np.float32(1e-4)
# Looking a value up by its byte is twice as fast as casting it.
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each axis of a weight [out, in]."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantise(
    weight: Float[np.ndarray, "o i"],
    scales: Float[np.ndarray, "o/128 i/128"],
    dtype: np.dtype | type = np.float32,
) -> Float[np.ndarray, "o i"]:
    """The product of weight and scale in float32, rounded to `dtype`."""
    _check(weight, scales, E4M3)
    out = np.empty(weight.shape, dtype)
    for rows, scale in _bands(scales, weight.shape):
        out[rows] = (_VALUES[weight[rows].view(np.uint8)] * scale).astype(dtype)
    return out


def quantise(
    weight: Float[np.ndarray, "o i"],
    scales: Float[np.ndarray, "o/128 i/128"] | None = None,
) -> tuple[Float[np.ndarray, "o i"], Float[np.ndarray, "o/128 i/128"]]:
    """E4M3 bits and scales; without given scales a block's largest magnitude becomes 448.

    Values are clipped to what e4m3 holds before they are cast, since the cast would give NaN.
    """
    if scales is None:
        scales = fresh_scales(weight)
    _check(weight, scales)
    out = np.empty(weight.shape, E4M3)
    for rows, scale in _bands(scales, weight.shape):
        scaled = weight[rows].astype(np.float32) / scale
        out[rows] = np.clip(scaled, -LARGEST, LARGEST).astype(E4M3)
    return out, scales


def fresh_scales(
    weight: Float[np.ndarray, "o i"], power_of_two: bool = False
) -> Float[np.ndarray, "o/128 i/128"]:
    """Largest magnitude of each block (at least 1e-4) over 448, rounded up to 2^k on request."""
    _check(weight)
    starts = range(0, weight.shape[0], BLOCK)
    columns = [np.abs(weight[i : i + BLOCK].astype(np.float32)).max(axis=0) for i in starts]
    amax = _by_block(np.maximum, np.stack(columns))
    if not np.isfinite(amax).all():
        raise ValueError("the weight holds NaN or infinity: FP8 needs finite values")
    scales = np.maximum(amax, _SMALLEST_AMAX) / LARGEST
    if not power_of_two:
        return scales
    mantissa, exponent = np.frexp(scales)
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5))


def requantise(
    weight: Float[np.ndarray, "o i"],
    stored: Float[np.ndarray, "o/128 i/128"],
    power_of_two: bool = False,
) -> tuple[Float[np.ndarray, "o i"], Float[np.ndarray, "o/128 i/128"]]:
    """Like `quantise`, but a block that its stored scale reproduces exactly keeps scale and bits.

    Exactly means after rounding to the weight's own dtype, as it was when it was loaded.
    """
    _check(weight, stored)
    out, scales = np.empty(weight.shape, E4M3), stored.copy()
    for i in range(stored.shape[0]):
        rows, band = slice(i * BLOCK, (i + 1) * BLOCK), slice(i, i + 1)
        kept = _reproduced(weight[rows], stored[band])
        if not kept.all():
            fresh = fresh_scales(weight[rows], power_of_two)
            scales[band] = np.where(kept, stored[band], fresh)
        out[rows] = quantise(weight[rows], scales[band])[0]
    return out, scales


def _reproduced(
    weight: Float[np.ndarray, "o i"], scales: Float[np.ndarray, "1 i/128"]
) -> Bool[np.ndarray, "1 i/128"]:
    """Which blocks of one band come back exactly through `scales`."""
    same = dequantise(quantise(weight, scales)[0], scales, weight.dtype) == weight
    return _by_block(np.logical_and, same.all(axis=0, keepdims=True))


def _by_block(reduce: np.ufunc, columns: np.ndarray) -> np.ndarray:
    return reduce.reduceat(columns, np.arange(0, columns.shape[1], BLOCK), axis=1)


def _bands(
    scales: Float[np.ndarray, "o/128 i/128"], shape: tuple[int, ...]
) -> Iterator[tuple[slice, Float[np.ndarray, "i"]]]:
    """Each band of 128 rows with its scales, one a column."""
    for band, scale in enumerate(scales):
        yield slice(band * BLOCK, (band + 1) * BLOCK), np.repeat(scale, BLOCK)[: shape[1]]


def _check(
    weight: np.ndarray, scales: np.ndarray | None = None, dtype: np.dtype | None = None
) -> None:
    if weight.ndim != 2 or not weight.size or (dtype is not None and weight.dtype != dtype):
        raise ValueError(f"weight is {weight.dtype} {weight.shape}: expected {dtype or ''} [o, i]")
    if scales is not None and scales.shape != scale_shape(weight.shape):
        raise ValueError(
            f"scales are {scales.shape} for a weight {weight.shape}: "
            f"expected {scale_shape(weight.shape)}, one for each {BLOCK} x {BLOCK} block"
        )
