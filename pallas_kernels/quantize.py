"""FP8 (e4m3) quantisation with a float32 scale for every tile of 128 values or 128 x 128 block.

The formats are those of the DeepSeek-V3 report, section 3.3, and of DeepGEMM's casts:
activations in 1 x 128 tiles along K, weights in 128 x 128 blocks, and for weight gradients the
transposed tensor in tiles of 128 tokens. With amax the largest magnitude of a tile, `scale = amax /
448` and `q = x * (1 / scale)`, so that `q * scale` gives x back; `power_of_two` rounds the scale up
to a power of two. A tile that holds a NaN or an infinity becomes NaN altogether, values and scale;
other tiles do not notice.

Scales go down to 2**-60, where two of them still multiply to a normal number. DeepGEMM's casts stop
at an amax of 1e-4, which serves activations: the gradients of a mean over a batch of many tokens
are smaller, and would lose what is below a few hundredths of that.

`backend="auto"` takes the Hopper kernels where they apply and plain jnp elsewhere. The two give the
same bits, except in `swiglu_quantize` and `rmsnorm_quantize`, whose exp, division, rsqrt and sums
are not rounded alike: there scales differ by a few units in the last place, and a few values lie
on the neighbouring e4m3 number. Differentiating anything but `dequantize` raises TypeError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels import checks, gemm_backend
from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.gemm_backend import Backend

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float8e4m3fn, Int32

    Quantized = tuple[Float8e4m3fn[Array, "..."], Float[Array, "..."]]

TILE = 128
LEAST_AMAX = 448 * 2.0**-60
FLOATS = (jnp.bfloat16, jnp.float32)
ROW_BYTES = 16  # TMA: a row of e4m3 is a whole number of these
RMSNORM_MOST = 16384  # columns: two rows of float32 have to fit shared memory
EXPONENT, MANTISSA, UPPER_HALF, ONE = map(np.int32, (0x7F800000, 0x7FFFFF, -0x1000, 0x3F800000))
STEP, SEVEN_QUARTERS = map(np.int32, (0x800000, 0x600000))  # of exponents; 1.75's fraction


def padded_rows(m: int, groups: int = 0) -> int:
    """Columns of the transposed form of m rows, 128 * (ceil(m / 128) + groups).

    With groups it is a bound that does not depend on their sizes.
    """
    return TILE * (ceil_div(m, TILE) + groups)


def quantize_tiles(
    x: Float[Array, "m k"], *, power_of_two: bool = False, backend: Backend = "auto"
) -> Quantized:
    """e4m3 [M, K] and float32 scales [M, ceil(K / 128)], one for every 1 x 128 along K.

    x is bfloat16 or float32 [M, K]. Raises ValueError on other inputs, and for
    backend="mosaic_gpu" on K that is not divisible by 16.
    """
    checks.array("x", x, "[M, K]", *FLOATS)
    x = _constant(x)
    if _use_kernel(backend, x, "K", x.shape[1]):
        from pallas_kernels import sm90_quantize

        return sm90_quantize.tiles(x, power_of_two=power_of_two)
    return _tiles(x, power_of_two)


def quantize_blocks(
    w: Float[Array, "*groups n k"], *, power_of_two: bool = False, backend: Backend = "auto"
) -> Quantized:
    """e4m3 [..., N, K] and float32 scales [..., ceil(N / 128), ceil(K / 128)].

    w is bfloat16 or float32 [..., N, K]; every 128 x 128 block of a matrix has one scale. Raises
    ValueError on other inputs, and for backend="mosaic_gpu" on K that is not divisible by 16.
    """
    checks.array("w", w, "[..., N, K]", *FLOATS)
    w = _constant(w)
    if _use_kernel(backend, w, "K", w.shape[-1]):
        q, scale = _blocks_kernel(w, power_of_two, False)
        return q, scale
    return _blocks(w, power_of_two)


def quantize_blocks_both(
    w: Float[Array, "*groups n k"], *, power_of_two: bool = False, backend: Backend = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q, scale, q_t): what `quantize_blocks` gives, and q with its last two axes exchanged.

    Both from one read of w. Raises ValueError as `quantize_blocks` does, and for
    backend="mosaic_gpu" on N that is not divisible by 16.
    """
    checks.array("w", w, "[..., N, K]", *FLOATS)
    w = _constant(w)
    fits = [_use_kernel(backend, w, *size) for size in zip("NK", w.shape[-2:], strict=True)]
    if all(fits):
        q, scale, q_t = _blocks_kernel(w, power_of_two, True)
        return q, scale, q_t
    q, scale = _blocks(w, power_of_two)
    return q, scale, q.swapaxes(-1, -2)


def _blocks_kernel(w: jax.Array, power_of_two: bool, transposed: bool) -> list[jax.Array]:
    from pallas_kernels import sm90_quantize_blocks

    *groups, n, k = w.shape
    found = sm90_quantize_blocks.blocks(
        w.reshape(-1, n, k), power_of_two=power_of_two, transposed=transposed
    )
    return [x.reshape(*groups, *x.shape[1:]) for x in found]


def quantize_both(
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, " g"] | None = None,
    *,
    power_of_two: bool = False,
    backend: Backend = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(q, scale, q_t, scale_t): x in tiles along K, and its transpose in tiles of 128 rows of x.

    x is bfloat16 or float32 [M, K] and read once; q and scale are those of `quantize_tiles`. q_t is
    e4m3 [K, Mp] and scale_t float32 [K, Mp / 128], with zeros behind the end of x.

    Without group_sizes, Mp = `padded_rows(M)`. group_sizes, int32 [G] on the device, says how many
    rows each group has in turn; some may be empty. Group g then starts at column
    128 * sum(ceil(group_sizes[:g] / 128)) of q_t and is filled with zeros up to the next multiple
    of 128, so that no tile mixes groups; Mp = `padded_rows(M, G)`, and columns behind the last
    group are zero. The sizes should add up to M: rows behind their sum are unspecified in q and
    scale and absent from q_t.

    Raises ValueError on other inputs, for backend="mosaic_gpu" on K that is not divisible by 16,
    and for sizes below 0 or above M in sum unless they are being traced (under jit).
    """
    checks.array("x", x, "[M, K]", *FLOATS)
    _check_groups(group_sizes, x)
    x = _constant(x)
    if _use_kernel(backend, x, "K", x.shape[1]):
        from pallas_kernels import sm90_quantize_transposed as kernels

        return kernels.both(x, group_sizes, power_of_two=power_of_two)
    return *_tiles(x, power_of_two), *_transposed(x, group_sizes, power_of_two)


def quantize_transposed(
    x: Float[Array, "m k"],
    group_sizes: Int32[Array, " g"] | None = None,
    *,
    power_of_two: bool = False,
    backend: Backend = "auto",
) -> Quantized:
    """(q_t, scale_t) of `quantize_both`, with its rules and errors: the transpose alone."""
    checks.array("x", x, "[M, K]", *FLOATS)
    _check_groups(group_sizes, x)
    x = _constant(x)
    if _use_kernel(backend, x, "K", x.shape[1]):
        from pallas_kernels import sm90_quantize_transposed as kernels

        return kernels.transposed(x, group_sizes, power_of_two=power_of_two)
    return _transposed(x, group_sizes, power_of_two)


def requantize_transposed(
    q: Float8e4m3fn[Array, "m k"],
    scale: Float[Array, "m k_tiles"],
    group_sizes: Int32[Array, " g"] | None = None,
    *,
    power_of_two: bool = False,
    backend: Backend = "auto",
) -> Quantized:
    """The transposed form of what `quantize_tiles` gave: e4m3 [K, Mp] and scales [K, Mp / 128].

    q is e4m3 [M, K] with float32 scales [M, ceil(K / 128)]; their product in float32 is quantised
    anew in tiles of 128 rows (V3 report, section 3.5.2: saved activations turn from 1 x 128 to
    128 x 1 tiles). group_sizes, Mp, padding and errors are those of `quantize_both`.
    """
    checks.fp8("q", q, scale, "[M, K]")
    _check_groups(group_sizes, q)
    q, scale = _constant(q), _constant(scale)
    if _use_kernel(backend, q, "K", q.shape[1]):
        from pallas_kernels import sm90_quantize_transposed as kernels

        return kernels.requantize(q, scale, group_sizes, power_of_two=power_of_two)
    return _transposed(dequantize(q, scale, jnp.float32), group_sizes, power_of_two)


def swiglu_quantize(
    gate_up: Float[Array, "m two_f"], *, power_of_two: bool = False, backend: Backend = "auto"
) -> Quantized:
    """`quantize_tiles(silu(gate) * up)` in one pass: e4m3 [M, F], scales [M, ceil(F / 128)].

    gate_up is bfloat16 or float32 [M, 2F] with the gate first; the product is kept in float32, and
    one that overflows it counts as infinite. Raises ValueError on other inputs, and for
    backend="mosaic_gpu" on F that is not divisible by 16.
    """
    checks.array("gate_up", gate_up, "[M, 2F]", *FLOATS)
    checks.multiple("2F", gate_up.shape[1], 2)
    gate_up = _constant(gate_up)
    if _use_kernel(backend, gate_up, "F", gate_up.shape[1] // 2):
        from pallas_kernels import sm90_quantize

        return sm90_quantize.swiglu(gate_up, power_of_two=power_of_two)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return _tiles(gate / (1 + jnp.exp(-gate)) * up, power_of_two)


def swiglu_quantize_both(
    gate_up: Float[Array, "m two_f"], used: Int32[Array, " 1"] | None = None, *,
    power_of_two: bool = False, backend: Backend = "auto",
) -> tuple[Quantized, Quantized]:  # fmt: skip
    """`swiglu_quantize` and `quantize_tiles` of gate_up [M, 2F], in this order.

    From one read of gate_up where F is divisible by 128: else a tile holds both gate and up. Only
    the first `used` rows count, if given; results of others are unspecified. Raises ValueError as
    `swiglu_quantize` does.
    """
    checks.array("gate_up", gate_up, "[M, 2F]", *FLOATS)
    checks.multiple("2F", gate_up.shape[1], 2)
    if used is not None:
        checks.exact("used", used, (1,), jnp.int32)
    f = gate_up.shape[1] // 2
    if f % TILE == 0 and _use_kernel(backend, gate_up, "F", f):
        from pallas_kernels import sm90_quantize_swiglu as kernels

        return kernels.swiglu_both(_constant(gate_up), used, power_of_two=power_of_two)
    product = swiglu_quantize(gate_up, power_of_two=power_of_two, backend=backend)
    return product, quantize_tiles(gate_up, power_of_two=power_of_two, backend=backend)


def rmsnorm_quantize(
    x: Float[Array, "m k"],
    weight: Float[Array, " k"],
    eps: float,
    *,
    power_of_two: bool = False,
    backend: Backend = "auto",
) -> Quantized:
    """`quantize_tiles(x / sqrt(mean(x**2) + eps) * weight)` in one pass.

    x [M, K] and weight [K] are bfloat16 or float32; the norm is computed and kept in float32.
    Gives e4m3 [M, K] and scales [M, ceil(K / 128)]. Raises ValueError on other inputs, and for
    backend="mosaic_gpu" on K that is not divisible by 16 or above 16384.
    """
    checks.array("x", x, "[M, K]", *FLOATS)
    checks.array("weight", weight, "[K]", *FLOATS)
    checks.same("K", -1, x=x, weight=weight)
    x, weight = _constant(x), _constant(weight)
    if _use_kernel(backend, x, "K", x.shape[1], RMSNORM_MOST):
        from pallas_kernels import sm90_quantize_rmsnorm

        return sm90_quantize_rmsnorm.rmsnorm(x, weight, eps=eps, power_of_two=power_of_two)
    values = x.astype(jnp.float32)
    variance = jnp.mean(values * values, axis=1, keepdims=True)
    return _tiles(values * lax.rsqrt(variance + eps) * weight.astype(jnp.float32), power_of_two)


def dequantize(
    q: Float8e4m3fn[Array, "*groups n k"],
    scale: Float[Array, "*groups n_tiles k_tiles"],
    dtype: DTypeLike = jnp.bfloat16,
    *,
    block_rows: Literal[1, 128] | None = None,
) -> Float[Array, "*groups n k"]:
    """q times its scales, multiplied in float32 and rounded once to dtype.

    q is e4m3 [..., N, K]; scale is float32 with a value for every 1 x 128 tile,
    [..., N, ceil(K / 128)], or 128 x 128 block, [..., ceil(N / 128), ceil(K / 128)]. Its shape says
    which, unless `block_rows` (1 or 128) does. Raises ValueError where the shapes do not fit.
    """
    checks.array("q", q, "[..., N, K]", E4M3)
    if block_rows not in (None, 1, TILE):
        raise ValueError(f"block_rows is {block_rows}: expected 1 or {TILE}")
    *groups, n, k = q.shape
    fits = {
        rows: (*groups, ceil_div(n, rows), ceil_div(k, TILE))
        for rows in (1, TILE)
        if block_rows in (None, rows)
    }
    rows = next((rows for rows, shape in fits.items() if scale.shape == shape), None)
    if rows is None or scale.dtype != jnp.float32:
        raise ValueError(
            f"scale is {scale.dtype} {scale.shape}: for q {q.shape} expected float32 "
            + " or ".join(map(str, fits.values()))
        )
    each = jnp.repeat(jnp.repeat(scale, TILE, axis=-1)[..., :k], rows, axis=-2)[..., :n, :]
    return (q.astype(jnp.float32) * each).astype(dtype)


def tile_scale(
    amax: Float[Array, "*tiles"], power_of_two: bool
) -> tuple[Float[Array, "*tiles"], Float[Array, "*tiles"]]:
    """(scale, 1 / scale) of tiles with those largest magnitudes; NaN where amax is not finite.

    Correctly rounded with any compiler: XLA and Mosaic replace or approximate divisions, so these
    divide through products and differences that are exact in float32, with or without FMA. Values
    times that inverse round to e4m3's largest number, 448, at most, and need no clipping.
    """
    scale = scale_of(amax, power_of_two)
    return scale, _inverse_power(scale) if power_of_two else _inverse(scale)


def scale_of(amax: Float[Array, "*tiles"], power_of_two: bool) -> Float[Array, "*tiles"]:
    """The first of `tile_scale`."""
    seventh, least = np.float32(1 / 7), np.float32(LEAST_AMAX)
    amax = jnp.where(amax < least, least, amax)
    if power_of_two:
        # 448 is 1.75 * 2**8: an amax whose fraction is above that takes the next power.
        bits = lax.bitcast_convert_type(amax, jnp.int32) + (MANTISSA - SEVEN_QUARTERS)
        scale = lax.bitcast_convert_type((bits & EXPONENT) - 8 * STEP, jnp.float32)
        return jnp.where(amax < jnp.inf, scale, jnp.nan)
    amax *= np.float32(1 / 64)
    guess = amax * seventh
    return guess + ((amax - 8 * guess) + guess) * seventh


def _inverse_power(scale: jax.Array) -> jax.Array:
    """1 / scale of powers of two."""
    bits = 2 * ONE - lax.bitcast_convert_type(scale, jnp.int32)
    return jnp.where(scale == scale, lax.bitcast_convert_type(bits, jnp.float32), scale)


def _inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, for normal scales below 2**126: the nearest of five neighbours of a quotient."""
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    fraction = lax.bitcast_convert_type((bits & MANTISSA) | ONE, jnp.float32)
    power = lax.bitcast_convert_type(2 * ONE - (bits & EXPONENT), jnp.float32)
    quotient = 1 / fraction
    error = _error(fraction, quotient)
    for _ in range(2):
        step = jnp.where(error > 0, 1, -1)
        other = lax.bitcast_convert_type(
            lax.bitcast_convert_type(quotient, jnp.int32) + step, jnp.float32
        )
        other_error = _error(fraction, other)
        closer = jnp.abs(other_error) < jnp.abs(error)
        quotient = jnp.where(closer, other, quotient)
        error = jnp.where(closer, other_error, error)
    return jnp.where(scale == scale, quotient * power, scale)


def _error(x: jax.Array, inverse: jax.Array) -> jax.Array:
    """1 - x * inverse, where that is small. Products of 12-bit halves are exact."""
    (high, low), (inverse_high, inverse_low) = _halves(x), _halves(inverse)
    coarse = 1 - high * inverse_high
    return coarse - high * inverse_low - low * inverse_high - low * inverse_low


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32) & UPPER_HALF, jnp.float32
    )
    return high, x - high


def _use_kernel(backend: Backend, x: jax.Array, letter: str, width: int, most: int = 0) -> bool:
    gemm_backend.check(backend)
    fits = width % ROW_BYTES == 0 and (not most or width <= most)
    if backend == "mosaic_gpu" and not fits:
        limit = f" up to {most}" if most else ""
        raise ValueError(f"{letter} is {width}: mosaic_gpu takes multiples of {ROW_BYTES}{limit}")
    return x.size > 0 and fits and gemm_backend.takes_kernels(backend)


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
    return x


@_constant.defjvp
def _refuse_gradient(primals: tuple, tangents: tuple) -> NoReturn:
    raise TypeError("quantisation is not differentiable: use fp8_linear, or jax.custom_vjp")


def _check_groups(sizes: jax.Array | None, x: jax.Array) -> None:
    if sizes is not None:
        checks.group_sizes(sizes, None, x.shape[0])


def _tiles(x: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    cols = ceil_div(k, TILE)
    tiles = jnp.pad(x, ((0, 0), (0, -k % TILE))).reshape(m, cols, TILE)
    q, scale = _quantize(tiles, (2,), power_of_two)
    return q.reshape(m, cols * TILE)[:, :k], scale[..., 0]


def _blocks(w: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    *groups, n, k = w.shape
    padding = [(0, 0)] * len(groups) + [(0, -n % TILE), (0, -k % TILE)]
    rows, cols = ceil_div(n, TILE), ceil_div(k, TILE)
    tiles = jnp.pad(w, padding).reshape(*groups, rows, TILE, cols, TILE)
    q, scale = _quantize(tiles, (-3, -1), power_of_two)
    q = q.reshape(*groups, rows * TILE, cols * TILE)[..., :n, :k]
    return q, scale[..., 0, :, 0]


def _transposed(
    x: jax.Array, sizes: jax.Array | None, power_of_two: bool
) -> tuple[jax.Array, jax.Array]:
    m, k = x.shape
    width = padded_rows(m, 0 if sizes is None else sizes.shape[0])
    if sizes is not None and m:
        x = jnp.take(x, _source_rows(m, width, sizes), axis=0, mode="fill", fill_value=0)
    else:
        x = jnp.pad(x, ((0, width - m), (0, 0)))
    q, scale = _quantize(x.reshape(width // TILE, TILE, k), (1,), power_of_two)
    return q.reshape(width, k).T, scale[:, 0].T


def _source_rows(m: int, width: int, sizes: jax.Array) -> jax.Array:
    """The row of x that each column of the transposed form holds, m for padding."""
    padded = ceil_div(sizes, TILE) * TILE
    ends, row_ends = jnp.cumsum(padded), jnp.cumsum(sizes)
    column = jnp.arange(width)
    group = jnp.minimum(jnp.searchsorted(ends, column, side="right"), sizes.shape[0] - 1)
    within = column - (ends - padded)[group]
    inside = (within < sizes[group]) & (column < ends[-1])
    return jnp.where(inside, (row_ends - sizes)[group] + within, m)


def _quantize(
    x: jax.Array, axes: tuple[int, ...], power_of_two: bool
) -> tuple[jax.Array, jax.Array]:
    """x with one scale for all of `axes`, which stay in the scale with length 1."""
    x = x.astype(jnp.float32)
    # As integers magnitudes have the same order and NaN is the largest; XLA's maximum of floats
    # loses NaN on the CPU.
    bits = lax.bitcast_convert_type(x, jnp.int32) & (EXPONENT | MANTISSA)
    amax = lax.bitcast_convert_type(jnp.max(bits, axis=axes, keepdims=True), jnp.float32)
    scale, inverse = tile_scale(amax, power_of_two)
    return (x * inverse).astype(E4M3), scale
