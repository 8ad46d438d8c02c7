"""FP8 layers: near the plain product and its gradients, and equal where FP8 is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.fp8_gemm import fp8_gemm
from pallas_kernels.fp8_linear import fp8_grouped_linear, fp8_linear
from pallas_kernels.quantize import quantize_blocks, quantize_tiles
from tests.products import (
    BLOCK,
    GROUPS,
    assert_refuses,
    counts,
    group_slices,
    grouped,
    relative_error,
    true,
)

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")

QUANTISED = 0.06
"""Relative error that three roundings to e4m3 stay below: x, w or dy, and x once more."""


def draw(*shapes, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def forward_and_back(layer, x, w, dy):
    out, pull = jax.vjp(layer, x, w)
    return out, *pull(dy)


def assert_near(found, expected, allowed=QUANTISED):
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) <= allowed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [((70,), 72, 144), ((2, 65), 20, 40), ((1,), 1, 7), ((), 8, 16), ((2, 2, 64), 256, 128)],
)
def test_near_the_plain_product(tokens, n, k, dtype):
    x, dy = draw((*tokens, k), (*tokens, n), dtype=dtype)
    (w,) = draw((n, k), seed=1)
    out, d_x, d_w = forward_and_back(fp8_linear, x, w, dy)
    assert (out.dtype, d_x.dtype, d_w.dtype) == (dtype, dtype, w.dtype)
    plain = [array.astype(jnp.float32) for array in (x, w, dy)]
    assert_near((out, d_x, d_w), forward_and_back(lambda x, w: x @ w.T, *plain))


def test_weight_gradient_has_the_weights_dtype():
    x, dy = draw((70, 48), (70, 32))
    (w,) = draw((32, 48), dtype=jnp.bfloat16)
    assert forward_and_back(fp8_linear, x, w, dy)[2].dtype == jnp.bfloat16


def plain_groups(x, w, dy, sizes):
    """The product and its gradients in float64, zeros behind the groups."""
    x, w, dy = true(x), true(w), true(dy)
    d_w = np.stack([dy[rows].T @ x[rows] for rows in group_slices(sizes)])
    return grouped(x, w, sizes), grouped(dy, w.swapaxes(1, 2), sizes), d_w


@jax.jit
def by_group(x, w, dy, sizes):
    out, pull = jax.vjp(lambda x, w: fp8_grouped_linear(x, w, sizes), x, w)
    return out, *pull(dy)


@pytest.mark.parametrize("n", [32, 20])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_groups_are_near_the_plain_product(sizes, n):
    x, w, dy = draw((72, 40), (len(sizes), n, 40), (72, n))
    out, d_x, d_w = by_group(x, w, dy, counts(sizes))
    used = slice(sum(sizes))
    expected_out, expected_d_x, expected_d_w = plain_groups(x, w, dy, sizes)
    assert_near((out[used], d_x[used]), (expected_out[used], expected_d_x[used]))
    assert_near((d_w,), (expected_d_w,))


def test_rows_behind_the_groups_do_not_enter_the_weight_gradient():
    sizes = [20, 0, 10]
    x, w, dy = draw((72, 48), (3, 32, 48), (72, 32))
    x, dy = x.at[30:].set(jnp.nan), dy.at[30:].set(jnp.nan)
    found = by_group(x, w, dy, counts(sizes))
    expected = plain_groups(x[:30], w, dy[:30], sizes)
    assert_near((found[0][:30], found[1][:30], found[2]), expected)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 100), min_size=3, max_size=3), st.integers(0, 99))
def test_any_groups(sizes, seed):
    x, w, dy = draw((sum(sizes), 48), (3, 32, 48), (sum(sizes), 32), seed=seed)
    behind = ((0, 300 - sum(sizes)), (0, 0))
    out, d_x, d_w = by_group(jnp.pad(x, behind), w, jnp.pad(dy, behind), counts(sizes))
    expected = plain_groups(x, w, dy, sizes)
    assert_near((out[: sum(sizes)], d_x[: sum(sizes)], d_w), expected)


def exact(*shape, seed=0):
    """Whole numbers that FP8 holds exactly: 7 leads every tile of 128 along either axis."""
    values = np.random.default_rng(seed).integers(-7, 8, size=shape).astype(np.float32)
    values[..., ::BLOCK, :] = values[..., :, ::BLOCK] = 7
    return jnp.asarray(values)


@pytest.mark.parametrize(("m", "n", "k"), [(130, 136, 144), (5, 20, 24)])
def test_exact_where_fp8_is(m, n, k):
    x, w, dy = exact(m, k), exact(n, k, seed=1), exact(m, n, seed=2)
    assert_near(
        forward_and_back(fp8_linear, x, w, dy), (x @ w.T, dy @ w, dy.T @ x), allowed=1e-6
    )  # fmt: skip


def test_gradients_are_finite_differences():
    """The map is linear in x and in w, so that any step between exact points is a derivative."""
    x, w, dy = exact(130, 144), exact(136, 144, seed=1), exact(130, 136, seed=2)
    out, d_x, d_w = forward_and_back(fp8_linear, x, w, dy)
    x_there, w_there = exact(130, 144, seed=3), exact(136, 144, seed=4)
    for there, gradient, step in (
        (fp8_linear(x_there, w), d_x, x_there - x),
        (fp8_linear(x, w_there), d_w, w_there - w),
    ):
        rise = np.vdot(true(there) - true(out), true(dy))
        np.testing.assert_allclose(rise, np.vdot(true(gradient), true(step)), rtol=1e-5)


def test_forward_is_the_fp8_product_under_jit_too():
    x, w = draw((70, 144), (72, 144))
    out = fp8_linear(x, w)
    product = fp8_gemm(*quantize_tiles(x), *quantize_blocks(w), out_dtype=jnp.float32)
    assert np.array_equal(out, product)
    assert relative_error(jax.jit(fp8_linear)(x, w), out) <= 1e-6


def test_keeps_one_byte_a_value_for_the_backward_pass():
    x, w = draw((256, 384), (512, 384))
    _, pull = jax.vjp(fp8_linear, x, w)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert kept <= 1.04 * (x.size + w.size)


def test_rows_over_two_devices():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spread = jax.shard_map(
        fp8_linear, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False
    )
    x, w, dy = draw((256, 144), (72, 144), (256, 72))
    found = jax.jit(lambda *arrays: forward_and_back(spread, *arrays))(x, w, dy)
    assert_near(found, forward_and_back(fp8_linear, x, w, dy), allowed=1e-6)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (4, 0, 16), (4, 8, 0)])
def test_zero_sizes(m, n, k):
    x, w, dy = draw((m, k), (2, n, k), (m, n))
    found = forward_and_back(fp8_linear, x, w[0], dy)
    found += by_group(x, w, dy, counts([m, 0]))
    for array, shape in zip(
        found, [(m, n), (m, k), (n, k), (m, n), (m, k), (2, n, k)], strict=True
    ):
        assert np.array_equal(array, np.zeros(shape))


def test_gradient_of_the_sizes_is_float0():
    x, w = draw((8, 16), (2, 8, 16))

    def loss(sizes):
        return fp8_grouped_linear(x, w, sizes).sum()

    gradient = jax.grad(loss, allow_int=True)(counts([3, 5]))
    assert (gradient.shape, gradient.dtype) == ((2,), jax.dtypes.float0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((4, 16), jnp.float16)}, r"x is float16 \(4, 16\): .* bfloat16 or float32"),
        ({"x": jnp.zeros(())}, r"x is float32 \(\): expected .* \[\.\.\., K\]"),
        ({"x": jnp.zeros((4, 24))}, r"K is 24 in x \(4, 24\) and 16 in w"),
        ({"w": jnp.zeros((1, 8, 16))}, r"w is float32 \(1, 8, 16\): .* \[N, K\]"),
        ({"w": jnp.zeros((8, 16), jnp.int32)}, "w is int32"),
        ({"backend": "cublas"}, "backend is 'cublas'"),
    ],
)
def test_refuses(change, message):
    assert_refuses(fp8_linear, {"x": jnp.zeros((4, 16)), "w": jnp.zeros((8, 16))}, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((1, 4, 16))}, r"x is float32 \(1, 4, 16\): .* \[T, K\]"),
        ({"w": jnp.zeros((8, 16))}, r"w is float32 \(8, 16\): .* \[G, N, K\]"),
        ({"group_sizes": counts([1])}, r"group_sizes is int32 \(1,\): expected int32 \(2,\)"),
        ({"group_sizes": counts([3, 3])}, r"\[3, 3\] add up to 6: expected at most T = 4"),
    ],
)
def test_grouped_refuses(change, message):
    good = {"x": jnp.zeros((4, 16)), "w": jnp.zeros((2, 8, 16)), "group_sizes": counts([1, 3])}
    assert_refuses(fp8_grouped_linear, good, change, message)
