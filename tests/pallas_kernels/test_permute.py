"""The jnp side of gathered, spread and summed rows against numpy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.permute import (
    combine_rows,
    gather_quantized,
    gather_rows,
    spread_quantized,
    spread_rows,
)

E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
DTYPES = [E4M3, BF16, np.float32]
reference = functools.partial(dict, backend="reference")


def draw(shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def indices(shape, of, seed=0):
    return np.random.default_rng([seed, *shape, of]).integers(0, of, shape).astype(np.int32)


def permutation(tokens, choices, seed=0):
    rng = np.random.default_rng([seed, tokens, choices])
    return rng.permutation(tokens * choices).reshape(tokens, choices).astype(np.int32)


def bits(x):
    """Of memory, NaN included."""
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def assert_same_bits(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(bits(found), bits(expected))


def spread(x, slots):
    out = np.zeros((slots.size, x.shape[1]), x.dtype)
    for token, own in enumerate(slots):
        out[own] = x[token]
    return out


def assert_near_sum(found, y, slots, weights):
    """Within a rounding to y's dtype of the sum, whose own roundings are float32's."""
    parts = np.asarray(y, np.float64)[np.asarray(slots)]
    parts *= 1 if weights is None else np.asarray(weights, np.float64)[..., None]
    last = 2.0**-8 if y.dtype == BF16 else 2.0**-23
    most = last * np.abs(parts.sum(1)) + 2.0**-21 * np.abs(parts).sum(1)
    assert found.dtype == y.dtype
    assert (np.abs(np.asarray(found, np.float64) - parts.sum(1)) <= most).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "rows"), [(7, 24, 19), (1, 16, 5), (5, 3, 0)])
def test_gather(tokens, width, rows, dtype):
    x, chosen = draw((tokens, width), dtype), indices((rows,), tokens)
    assert_same_bits(gather_rows(x, chosen, **reference()), x[chosen])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "choices"), [(7, 3), (1, 1), (1, 6), (0, 2), (3, 0)])
def test_spread(tokens, choices, dtype):
    x, slots = draw((tokens, 24), dtype), permutation(tokens, choices)
    assert_same_bits(spread_rows(x, slots, **reference()), spread(x, slots))


def test_spread_is_the_gather_of_the_inverse():
    x, slots = draw((9, 16)), permutation(9, 4)
    rows = np.argsort(slots.reshape(-1)).astype(np.int32) // 4
    assert_same_bits(spread_rows(x, slots), gather_rows(x, rows))


@pytest.mark.parametrize("width", [128, 272])
def test_quantized(width):
    q, scale = draw((6, width), E4M3), draw((6, -(-width // 128)))
    rows, slots = indices((11,), 6), permutation(6, 2)
    found = gather_quantized(q, scale, rows, **reference())
    assert_same_bits(found[0], q[rows])
    assert_same_bits(found[1], scale[rows])
    found = spread_quantized(q, scale, slots, **reference())
    assert_same_bits(found[0], spread(q, slots))
    assert_same_bits(found[1], spread(scale, slots))


@pytest.mark.parametrize("choices", [1, 6, 16])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_combine(choices, weighted, dtype):
    y, slots = draw((31, 40), dtype), indices((9, choices), 31)
    weights = draw((9, choices)) if weighted else None
    found = combine_rows(y, slots, weights, **reference())
    assert_near_sum(found, y, slots, weights)


def test_combine_rounds_once():
    """In bfloat16 256 + 1 is 256."""
    y = np.array([[256], [1], [1]], BF16)
    found = combine_rows(y, np.array([[0, 1, 2]], np.int32))
    assert np.asarray(found, np.float32) == 258


def test_combine_of_no_tokens():
    found = combine_rows(draw((0, 128), BF16), np.zeros((0, 2), np.int32))
    assert found.shape == (0, 128)


def test_unnamed_rows_do_not_matter():
    x, y = draw((4, 16)), draw((4, 128), BF16)
    x[1], y[1] = np.nan, np.nan
    chosen = np.array([[0, 2], [3, 3]], np.int32)
    assert np.isfinite(gather_rows(x, chosen.reshape(-1))).all()
    assert np.isfinite(np.asarray(combine_rows(y, chosen), np.float32)).all()


def test_traced_indices_are_clamped():
    x, y = draw((4, 16)), draw((4, 128), BF16)
    rows = np.array([-1, 4, 2**31 - 1, -(2**31), 2], np.int32)
    clamped = np.clip(rows, 0, 3)
    assert_same_bits(jax.jit(gather_rows)(x, rows), x[clamped])
    found = jax.jit(combine_rows)(y, rows[:, None])
    assert_same_bits(found, y[clamped])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, q, i: gather_rows(x.astype(np.float16), i), "x is float16"),
        (lambda x, q, i: gather_rows(x[0], i), r"x is float32 \(128,\): expected .* \[T, w\]"),
        (lambda x, q, i: gather_rows(x, i.astype(np.int64)), "rows is int64"),
        (lambda x, q, i: gather_rows(x, i + 3), r"rows\[1\] is 4: expected 0 to T - 1 = 3"),
        (lambda x, q, i: gather_rows(x, i - 1), r"rows\[0\] is -1: expected 0 to T - 1 = 3"),
        (lambda x, q, i: gather_rows(x[:0], i), r"T is 0: rows \(2,\) can take nothing"),
        (lambda x, q, i: gather_rows(x, i, backend="cuda"), "backend is 'cuda'"),
        (lambda x, q, i: gather_quantized(q, x, i), r"q_scale is float32 \(4, 128\)"),
        (lambda x, q, i: gather_quantized(x, x[:, :1], i), "q is float32"),
        (lambda x, q, i: gather_quantized(q, x[:, :1], i + 4), r"rows\[0\] is 4"),
        (lambda x, q, i: spread_rows(x, i[:, None]), r"T is 4 in x \(4, 128\) and 2 in slots"),
        (lambda x, q, i: spread_rows(x[:2], i[:, None] * 2), r"slots\[1, 0\] is 2: .* = 1"),
        (lambda x, q, i: spread_rows(x[:2], i[:, None] * 0), "slots hold 0 2 times"),
        (lambda x, q, i: spread_quantized(q[:2], x[:2, :1], i), r"slots is int32 \(2,\)"),
        (lambda x, q, i: combine_rows(q, i[:, None]), "y is float8_e4m3fn"),
        (lambda x, q, i: combine_rows(x.astype(BF16), i), r"slots is int32 \(2,\)"),
        (lambda x, q, i: combine_rows(x.astype(BF16), i[:, None], i), "weights is int32"),
        (lambda x, q, i: combine_rows(x.astype(BF16), i[:, None][:, :0]), r"slots is \(2, 0\)"),
        (lambda x, q, i: combine_rows(x.astype(BF16), i[:, None] + 3), r"slots\[1, 0\] is 4: .* 3"),
    ],
)
def test_refuses(run, message):
    with jax.enable_x64(True), pytest.raises(ValueError, match=message):
        run(*map(jnp.asarray, (draw((4, 128)), draw((4, 128), E4M3), np.arange(2, dtype=np.int32))))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: gather_rows(jnp.ones((2, 3)), jnp.zeros(1, jnp.int32), backend="mosaic_gpu"),
         "a row of 3 float32 has 12 bytes, k is 1: .* multiples of 16"),
        (lambda: spread_rows(jnp.ones((1, 4)), jnp.arange(33, dtype=jnp.int32)[None],
                             backend="mosaic_gpu"), "k is 33: .* k up to 32"),
        (lambda: combine_rows(jnp.ones((2, 64), jnp.bfloat16), jnp.zeros((1, 2), jnp.int32),
                              backend="mosaic_gpu"), "d 64 and k 2: .* multiples of 128"),
        (lambda: combine_rows(jnp.ones((2, 128), jnp.bfloat16), jnp.zeros((1, 33), jnp.int32),
                              backend="mosaic_gpu"), "k 33: .* 32 at most"),
        (lambda: combine_rows(jnp.ones((2, 128)), jnp.zeros((1, 2), jnp.int32),
                              backend="mosaic_gpu"), "y is float32.* takes bfloat16"),
    ],
)  # fmt: skip
def test_kernels_refuse(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_gradients_are_refused():
    x, y, i = draw((4, 128)), jnp.asarray(draw((4, 128), BF16)), jnp.arange(4, dtype=jnp.int32)
    slots, weights = i[:, None], jnp.ones((4, 1))
    for run, at in [
        (lambda x: gather_rows(x, i), x),
        (lambda x: spread_rows(x, slots), x),
        (lambda x: gather_quantized(jnp.zeros((4, 128), E4M3), x, i)[1], x[:, :1]),
        (lambda x: spread_quantized(jnp.zeros((4, 128), E4M3), x, slots)[1], x[:, :1]),
        (lambda y: combine_rows(y, slots, weights), y),
        (lambda w: combine_rows(y, slots, w), weights),
    ]:
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.grad(lambda v, run=run: run(v).astype(jnp.float32).sum())(jnp.asarray(at))
