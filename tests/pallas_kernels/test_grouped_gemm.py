"""Every backend of the grouped matmul against one matmul a group, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_gemm

CASES = {
    "even": [8, 8, 8],
    "uneven": [1, 17, 6],
    "empty groups": [0, 24, 0],
    "empty ends": [0, 0, 24],
    "one row": [0, 1, 0],
    "more than a block": [70, 3, 135],
}


def per_group(x, w, sizes):
    out, start = [], 0
    for matrix, size in zip(w, sizes, strict=True):
        out.append(np.asarray(x, np.float64)[start : start + size] @ np.asarray(matrix, np.float64))
        start += size
    return np.concatenate(out)


def inputs(sizes, k=48, n=40, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (sum(sizes), k), dtype)
    w = jax.random.normal(keys[1], (len(sizes), k, n), dtype)
    return x, w, jax.random.normal(keys[2], (sum(sizes), n), dtype)


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_values_and_gradients(backend, sizes):
    x, w, grad = inputs(sizes)
    counts = jnp.array(sizes, jnp.int32)
    out, pull = jax.vjp(lambda x, w: grouped_gemm(x, w, counts, backend=backend), x, w)
    np.testing.assert_allclose(out, per_group(x, w, sizes), rtol=1e-5, atol=1e-4)
    d_x, d_w = pull(grad)
    np.testing.assert_allclose(d_x, per_group(grad, w.swapaxes(1, 2), sizes), rtol=1e-5, atol=1e-4)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        expected = np.asarray(x, np.float64)[rows].T @ np.asarray(grad, np.float64)[rows]
        np.testing.assert_allclose(d_w[group], expected, rtol=1e-5, atol=1e-4)
        start += size


def test_no_rows():
    x, w, _ = inputs([0, 0])
    assert grouped_gemm(x, w, jnp.zeros(2, jnp.int32)).shape == (0, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((4, 3))}, "expected \\[m, k\\]"),
        ({"group_sizes": jnp.zeros(5, jnp.int32)}, "one size for each of 2"),
        ({"backend": "cublas"}, "backend is 'cublas'"),
        ({"backend": "mosaic_gpu"}, "takes bf16"),
    ],
)
def test_refuses(change, message):
    good = {"x": jnp.zeros((4, 8)), "w": jnp.zeros((2, 8, 8)),
            "group_sizes": jnp.zeros(2, jnp.int32), "backend": "auto"}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**(good | change))


@functools.partial(jax.jit, static_argnames="backend")
def forward_and_back(x, w, counts, grad, backend):
    out, pull = jax.vjp(lambda x, w: grouped_gemm(x, w, counts, backend=backend), x, w)
    return out, *pull(grad)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), [(256, 384), (72, 40)])
@pytest.mark.parametrize(
    "sizes",
    [[300, 0, 1, 723], [0, 0, 0, 1024], [256, 256, 256, 256], [130, 889, 0, 5], [0, 3, 0]],
)
def test_hopper_kernel(sizes, k, n):
    x, w, grad = inputs(sizes, k=k, n=n, dtype=jnp.bfloat16)
    counts = jnp.array(sizes, jnp.int32)
    results = {
        backend: [
            np.asarray(a, np.float32) for a in forward_and_back(x, w, counts, grad, backend=backend)
        ]
        for backend in ("mosaic_gpu", "blocks")
    }
    np.testing.assert_allclose(
        results["mosaic_gpu"][0], per_group(x, w, sizes), rtol=2e-2, atol=0.2
    )
    for kernel, reference in zip(*results.values(), strict=True):
        np.testing.assert_allclose(kernel, reference, rtol=2e-2, atol=0.3)
    again = forward_and_back(x, w, counts, grad, backend="mosaic_gpu")
    for first, second in zip(results["mosaic_gpu"], again, strict=True):
        assert np.array_equal(first, np.asarray(second, np.float32))
