"""Random FP8 and BF16 operands, and in float64 what their products should be."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

BLOCK = 128
OUT_ERROR = {jnp.bfloat16: 2e-3, jnp.float32: 2e-6}
"""Relative Frobenius error that a reference may have, by the dtype of its result."""

GROUPS = {
    "even": [24, 24, 24],
    "uneven": [1, 50, 21],
    "one giant": [0, 72, 0, 0],
    "first and last empty": [0, 30, 42, 0],
    "single rows": [1, 0, 1, 1],
    "rows left over": [20, 0, 10],
}
COLUMN_GROUPS = {
    "even": [128, 128, 128],
    "uneven": [1, 200, 130],
    "one giant": [0, 640, 0],
    "first and last empty": [0, 0, 77, 256, 0],
    "all empty": [0, 0],
    "blocks left over": [5, 0, 128],
}


def draw_fp8(shape, rows=1, seed=0):
    """e4m3 values up to 448 and their scales, 2**-6 to 2**6."""
    rng = np.random.default_rng([seed, *shape])
    q = np.clip(rng.normal(size=shape) * 120, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    blocks = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // BLOCK))
    scale = np.exp2(rng.uniform(-6, 6, blocks)).astype(np.float32)
    return jnp.asarray(q), jnp.asarray(scale)


def draw_bf16(shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)


def fp8_dense(m, n, k, seed=0):
    return *draw_fp8((m, k), seed=seed), *draw_fp8((n, k), BLOCK, seed + 1)


def fp8_groups(m, groups, n=72, k=144, seed=0):
    return *draw_fp8((m, k), seed=seed), *draw_fp8((groups, n, k), BLOCK, seed + 1)


def fp8_masked(groups, m, valid, n=72, k=144, seed=0):
    a, a_scale = draw_fp8((groups, m, k), seed=seed)
    b = draw_fp8((groups, n, k), BLOCK, seed + 1)
    return poisoned(a, valid), poisoned(a_scale, valid), *b, counts(valid)


def fp8_columns(m, n, k, seed=0):
    return *draw_fp8((m, k), seed=seed), *draw_fp8((n, k), seed=seed + 1)


def fp8_column_groups(sizes, m=24, n=40, k=640, seed=0):
    """Zeros from each group's end to the next block of 128, NaN in the blocks behind them all."""
    used = np.zeros(k, bool)
    for columns in group_slices(sizes, unit=BLOCK):
        used[columns] = True
    behind = BLOCK * sum(-(-size // BLOCK) for size in sizes)
    operands = []
    for q, scale in (draw_fp8((m, k), seed=seed), draw_fp8((n, k), seed=seed + 1)):
        filled, scales = np.where(used, q, np.zeros_like(q)), np.array(scale)
        filled[:, behind:], scales[:, behind // BLOCK :] = np.nan, np.nan
        operands += [jnp.asarray(filled), jnp.asarray(scales)]
    return *operands, counts(sizes)


def bf16_pair(left, right, seed=0):
    return draw_bf16(left, seed), draw_bf16(right, seed + 1)


def bf16_masked(groups, m, valid, n=72, k=136):
    a, b = bf16_pair((groups, m, k), (groups, n, k))
    return poisoned(a, valid), b, counts(valid)


def bf16_row_groups(sizes, t=72, k=24, n=40, seed=0):
    """The rows behind the groups hold NaN."""
    x, dy = bf16_pair((1, t, k), (1, t, n), seed)
    return poisoned(x, [sum(sizes)])[0], poisoned(dy, [sum(sizes)])[0], counts(sizes)


def poisoned(x, valid):
    """NaN in the rows past each count."""
    x = np.array(x)
    x[np.arange(x.shape[1]) >= np.array(valid, int)[:, None]] = np.nan
    return jnp.asarray(x)


def counts(sizes):
    return jnp.array(sizes, jnp.int32)


def true(q, scale=None, rows=1):
    """float64 of an operand, dequantised where it has scales."""
    values = np.asarray(q, np.float64)
    if scale is None:
        return values
    wide = np.repeat(np.asarray(scale, np.float64), BLOCK, axis=-1)[..., : values.shape[-1]]
    return values * np.repeat(wide, rows, axis=-2)[..., : values.shape[-2], :]


def group_slices(sizes, unit=1):
    """Where each group lies, whole units apart."""
    starts = np.cumsum([0, *(-(-size // unit) * unit for size in sizes)])
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def grouped(a, b, sizes):
    """Each group's rows of a times its own matrix, transposed; zeros behind them."""
    out = np.zeros((a.shape[0], b.shape[1]))
    for rows, matrix in zip(group_slices(sizes), b, strict=True):
        out[rows] = a[rows] @ matrix.T
    return out


def relative_error(out, expected):
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    assert out.shape == expected.shape
    return np.linalg.norm(out - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_refuses(function, good, change, message):
    with pytest.raises(ValueError, match=message):
        function(**(good | change))


def assert_no_gradient(function, operand, *others):
    """Under plain and jitted differentiation, with the layer to use instead."""

    def loss(operand):
        return function(operand, *others).astype(jnp.float32).sum()

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss))):
        with pytest.raises(TypeError, match="is not differentiable: use "):
            gradient(operand)
