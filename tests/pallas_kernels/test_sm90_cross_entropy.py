"""The Hopper kernel under the head's loss: in the interpreter, lowered for CUDA, and on a card."""

import contextlib
import importlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import device, sm90_cross_entropy
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.sm90_bf16_gemm_softmax import LOG2E, Powers, bf16_gemm_softmax
from pallas_kernels.sm90_tile import Tile
from tests.products import draw_bf16, relative_error

on_gpu = pytest.mark.gpu
module = importlib.import_module("pallas_kernels.linear_cross_entropy")

ROUNDING = 2e-3
"""Relative error in the root mean square of one rounding to bfloat16; the logits' gradient has two,
of powers and its own, the hidden states' a third."""

SUMS = 2e-5
CUT = 5e-6  # of a large sum: tensor cores cut digits off where float32 rounds
"""Absolute error of float32 sums of up to 128 products, some of them 50."""


def draw(m, d, p, seed=0):
    targets = np.random.default_rng(seed).integers(0, p, m)
    targets[:2] = 0, p - 1
    return draw_bf16((m, d), seed), draw_bf16((d, p), seed + 1), jnp.asarray(targets, jnp.int32)


def powers_of(logits, targets, width):
    """What the kernel should give, in float64."""
    x = (logits * LOG2E).reshape(len(logits), -1, width)
    most = x.max(axis=-1)
    powers = np.exp2(x - most[..., None])
    hits = logits[np.arange(len(logits)), targets]
    return Powers(powers.reshape(logits.shape), most.T, powers.sum(axis=-1).T, hits)


def softmax(logits, targets):
    """Nats and the gradient of their sum, in float64."""
    total = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    chosen = logits[np.arange(len(logits)), targets]
    onehot = np.arange(logits.shape[1]) == np.asarray(targets)[:, None]
    return total - chosen, np.exp(logits - total[:, None]) - onehot


@pytest.mark.parametrize("tile", [Tile(2, 256, 2, below=2, slots=2), Tile(1, 128, 3)])
def test_kernel(tile):
    """One cluster walks two tiles or more; with two SMs the last warpgroup has no rows."""
    a, b, targets = draw(136, 128, 512)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = bf16_gemm_softmax(
            a, b, targets, sms=tile.cluster, tile=tile,
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )  # fmt: skip
        found = Powers(*(np.asarray(array, np.float64) for array in found))
    assert "RACE" not in said.getvalue(), said.getvalue()
    expected = powers_of(np.asarray(a, np.float64) @ np.asarray(b, np.float64), targets, tile.width)
    np.testing.assert_allclose(found.most, expected.most, atol=SUMS)
    np.testing.assert_allclose(found.sums, expected.sums, rtol=SUMS)
    np.testing.assert_allclose(found.hits, expected.hits, atol=SUMS)
    np.testing.assert_allclose(found.powers, expected.powers, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_tiles_come_together(scale):
    rng = np.random.default_rng(1)
    logits, targets = rng.normal(size=(40, 1024)) * scale, rng.integers(0, 1024, 40)
    targets[:20] = logits.argmax(1)[:20]
    powers = powers_of(logits, targets, 256)
    found = Powers(jnp.asarray(powers.powers, jnp.bfloat16), *map(jnp.float32, powers[1:]))
    nats, share = sm90_cross_entropy.combine(found)
    weights = jnp.asarray(rng.uniform(size=40), jnp.float32)
    gradient = sm90_cross_entropy.d_logits(
        found.powers, share, nats, jnp.asarray(targets, jnp.int32), weights
    )
    true_nats, true_gradient = softmax(logits, targets)
    true_gradient *= np.asarray(weights, np.float64)[:, None]
    np.testing.assert_allclose(nats, true_nats, rtol=1e-6, atol=1e-6 * max(scale, 1))
    assert gradient.dtype == jnp.bfloat16
    found = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(found, true_gradient, rtol=2**-7, atol=1e-6 * max(scale, 1))
    assert relative_error(found, true_gradient) <= 2 * ROUNDING


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("b", "t", "d", "p"), [(8, 4096, 2048, 102_400), (1, 3, 64, 256), (2, 100, 7168, 129_280)]
)
def test_lowers_for_cuda(b, t, d, p):
    """The whole of forward and backward pass, with the kernel in it."""

    def loss(hidden, head, targets, weights):
        return module._cross_entropy(hidden, head, targets, weights, True)

    traced = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True)).trace(
        shape(b, t, d), shape(d, p, dtype=jnp.float32), shape(b, t, dtype=jnp.int32),
        shape(b, t, dtype=jnp.float32),
    )  # fmt: skip
    (_, nats), (d_hidden, d_head) = traced.out_info
    assert (nats.shape, d_hidden.shape, d_head.shape) == ((b, t), (b, t, d), (d, p))
    assert "bf16_gemm_softmax" in traced.lower(lowering_platforms=("cuda",)).as_text()


def taken(hidden, head, backend="auto"):
    return module._takes_kernel(hidden, head, backend)


def test_auto_takes_the_kernel_where_arrays_are_whole(monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)
    fitting = shape(2, 8, 64), shape(64, 256, dtype=jnp.float32)
    assert not taken(*fitting)  # of several devices: XLA may divide the arrays among them
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    inside = []

    def note(x):
        inside.append(taken(*fitting))
        return x

    jax.eval_shape(
        jax.shard_map(note, mesh=mesh, in_specs=P("data"), out_specs=P("data")), jnp.ones(2)
    )
    assert inside == [True]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert taken(*fitting)
    assert taken(*fitting, "mosaic_gpu")
    assert not taken(*fitting, "reference")
    assert not taken(shape(2, 8, 64, dtype=jnp.float32), fitting[1])
    assert not taken(shape(2, 8, 32), shape(32, 256))
    assert not taken(fitting[0], shape(64, 300))
    with pytest.raises(ValueError, match=r"head \(64, 300\): mosaic_gpu takes bfloat16, d a mult"):
        taken(fitting[0], shape(64, 300), "mosaic_gpu")


def test_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: 8.0)
    with pytest.raises(ValueError, match=r"backend is 'mosaic_gpu': .* need a Hopper GPU"):
        taken(shape(2, 8, 64), shape(64, 256), "mosaic_gpu")


@on_gpu
@pytest.mark.parametrize(
    ("m", "d", "p"), [(8, 64, 256), (136, 2048, 2560), (1000, 512, 10_240), (4096, 2048, 102_400)]
)
def test_kernel_on_a_card(m, d, p):
    a, b, targets = draw(m, d, p)
    found = bf16_gemm_softmax(a, b, targets, sms=132)
    again = bf16_gemm_softmax(a, b, targets, sms=132)
    logits = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    assert all(np.array_equal(x, y) for x, y in zip(found, again, strict=True))
    x = (logits * LOG2E).reshape(m, -1, 256)
    most = x.max(axis=-1)
    powers = jnp.exp2(x - most[..., None])
    scale = d**0.5
    np.testing.assert_allclose(found.most, most.T, rtol=CUT, atol=SUMS * scale)
    np.testing.assert_allclose(found.sums, powers.sum(axis=-1).T, rtol=SUMS * scale)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found.hits, chosen, rtol=CUT, atol=SUMS * scale)
    apart = jnp.linalg.norm(found.powers.astype(jnp.float32).reshape(x.shape) - powers)
    assert float(apart / jnp.linalg.norm(powers)) <= ROUNDING


@on_gpu
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize(("b", "t", "d", "p"), [(2, 52, 128, 1024), (3, 36, 2048, 12_800)])
def test_agrees_with_the_reference_on_a_card(b, t, d, p, slices, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", b * t * p // (2 * slices))
    rng = np.random.default_rng(0)
    hidden = draw_bf16((b, t, d))
    head = jnp.asarray(rng.normal(size=(d, p)) * 3 / d**0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, p, (b, t)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(b, t)) * rng.integers(0, 2, (b, t)), jnp.float32)

    def run(backend):
        def loss(hidden, head):
            return linear_cross_entropy(hidden, head, targets, weights, backend=backend)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)

    (loss, nats), gradients = run("mosaic_gpu")
    (true_loss, true_nats), expected = run("reference")
    np.testing.assert_allclose(loss, true_loss, rtol=1e-5)
    np.testing.assert_allclose(nats, true_nats, rtol=1e-5, atol=1e-5)
    for gradient, true in zip(gradients, expected, strict=True):
        assert gradient.dtype == true.dtype
        assert relative_error(gradient, true) <= 2 * ROUNDING
