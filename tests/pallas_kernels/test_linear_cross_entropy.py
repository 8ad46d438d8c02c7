"""The head with its loss: near the plain float32 loss and its gradients, in slices or whole."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from tests.products import assert_refuses, relative_error

module = importlib.import_module("pallas_kernels.linear_cross_entropy")
pytestmark = pytest.mark.usefixtures("auto_is_the_reference")

SUMS = 2e-6
"""Relative error of float32 sums in another order."""

ROUNDED = 3e-3
"""Of gradients made in bfloat16: the logits' gradient is rounded, and so is the result, each by
2e-3 in the root mean square (half a unit in the last place is 2 to 4e-3 of a number)."""

B, T, D, P = 2, 24, 16, 301


def draw(b=B, t=T, d=D, p=P, dtype=jnp.float32, head_dtype=jnp.float32, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(b, t, d)) * scale, dtype)
    head = jnp.asarray(rng.normal(size=(d, p)), head_dtype)
    targets = jnp.asarray(rng.integers(0, p, (b, t)), jnp.int32)
    weights = jnp.asarray(rng.uniform(size=(b, t)) * rng.integers(0, 2, (b, t)), jnp.float32)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights=None):
    log_p = jax.nn.log_softmax(jnp.matmul(hidden, head, precision="highest"))
    nats = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return (nats if weights is None else nats * weights).sum(), nats


def with_gradients(function, *operands, by=1.0):
    def loss(hidden, head):
        total, nats = function(hidden, head, *operands[2:])
        return by * total, nats

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*operands[:2])


def assert_near(operands, gradient_error=SUMS, by=1.0):
    (loss, nats), gradients = with_gradients(linear_cross_entropy, *operands, by=by)
    wide = [x.astype(operands[0].dtype).astype(jnp.float32) for x in operands[:2]]
    (true_loss, true_nats), expected = with_gradients(plain, *wide, *operands[2:], by=by)
    assert (loss.dtype, nats.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(loss, true_loss, rtol=1e-6)
    np.testing.assert_allclose(nats, true_nats, rtol=1e-6, atol=1e-5)
    for gradient, true, operand in zip(gradients, expected, operands, strict=False):
        assert gradient.dtype == operand.dtype
        assert relative_error(gradient, true) <= gradient_error


def in_slices(monkeypatch, count, p=P):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", B * p * T // count)


@pytest.mark.parametrize("slices", [1, 3, 24])
@pytest.mark.parametrize("weighted", [False, True])
def test_float32(slices, weighted, monkeypatch):
    in_slices(monkeypatch, slices)
    *operands, weights = draw()
    assert_near((*operands, weights if weighted else None))


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(slices, head_dtype, monkeypatch):
    in_slices(monkeypatch, slices)
    assert_near(draw(dtype=jnp.bfloat16, head_dtype=head_dtype), ROUNDED)


@pytest.mark.parametrize("p", [1, 2, 128, 1009])
def test_vocabularies(p):
    assert_near(draw(p=p))


def test_large_logits():
    """Exponentials of these overflow unless the maximum is taken off."""
    assert_near(draw(scale=100.0))


def test_slices_divide_the_time(monkeypatch):
    in_slices(monkeypatch, 5)  # 24 is no multiple of 5: 6 slices
    scans = [e for e in equations(linear_cross_entropy, *draw()) if e.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [6]
    assert_near(draw())


@pytest.mark.parametrize("by", [0.0, -2.5])
def test_scaled_cotangent(by):
    assert_near(draw(), by=by)


def test_head_is_summed_in_float32_over_slices(monkeypatch):
    """One token's gradient is 2**-10 of the others' sum: a bfloat16 sum would lose it."""
    in_slices(monkeypatch, T, p=8)
    *operands, weights = draw(p=8, dtype=jnp.bfloat16)
    weights = jnp.ones_like(weights).at[:, 12:].set(2.0**-10)
    _, (_, both) = with_gradients(linear_cross_entropy, *operands, weights)
    _, (_, first) = with_gradients(linear_cross_entropy, *operands, weights.at[:, 12:].set(0))
    _, (_, last) = with_gradients(linear_cross_entropy, *operands, weights.at[:, :12].set(0))
    assert relative_error(both - first, last) <= 1e-3


def test_plain_call_is_the_differentiated_one(monkeypatch):
    in_slices(monkeypatch, 3)
    operands = draw()
    loss, nats = jax.jit(lambda *operands: linear_cross_entropy(*operands))(*operands)
    (same_loss, same_nats), _ = with_gradients(linear_cross_entropy, *operands)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-6)
    np.testing.assert_allclose(nats, same_nats, rtol=1e-6)


def test_neither_nats_nor_weights_have_a_gradient():
    hidden, head, targets, weights = draw()

    def of_nats(hidden, head):
        return linear_cross_entropy(hidden, head, targets)[1].sum()

    def of_weights(weights):
        return linear_cross_entropy(hidden, head, targets, weights)[0]

    for gradient in (*jax.grad(of_nats, (0, 1))(hidden, head), jax.grad(of_weights)(weights)):
        assert not gradient.any()


def test_targets_that_do_not_exist_are_not_passed_over():
    hidden, head, targets, _ = draw()
    nats = linear_cross_entropy(hidden, head, targets.at[0, :2].set(jnp.array([-1, P])))[1]
    assert np.isnan(nats[0, :2]).all()
    assert np.isfinite(nats).sum() == nats.size - 2


def equations(function, *operands):
    """All of a program's, loops included; of one that was not traced before."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=callable):
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    yield from walk(inner)

    return list(walk(jax.make_jaxpr(lambda *operands: function(*operands))(*operands).jaxpr))


def gradient(*operands):
    return jax.grad(lambda *operands: linear_cross_entropy(*operands)[0], (0, 1))(*operands)


@pytest.mark.parametrize(("function", "count"), [(linear_cross_entropy, 1), (gradient, 3)])
@pytest.mark.parametrize("slices", [1, 4])
def test_logits_are_made_once_and_never_all_at_once(slices, function, count, monkeypatch):
    in_slices(monkeypatch, slices)
    found = equations(function, *draw())
    assert sum(equation.primitive.name == "dot_general" for equation in found) == count
    shapes = {out.aval.shape for equation in found for out in equation.outvars}
    assert {shape for shape in shapes if shape[2:] == (P,)} == {(B, T // slices, P)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.zeros((24, 16))}, r"hidden is float32 \(24, 16\): .* \[b, t, d\]"),
        ({"hidden": jnp.zeros((2, 24, 16), jnp.float16)}, "hidden is float16"),
        ({"hidden": jnp.zeros((2, 0, 16))}, r"hidden \(2, 0, 16\) .*: expected no empty axis"),
        ({"head": jnp.zeros((16, 301, 1))}, r"head is float32 \(16, 301, 1\): .* \[d, p\]"),
        ({"head": jnp.zeros((15, 301))}, r"d is 16 in hidden .* and 15 in head \(15, 301\)"),
        ({"targets": jnp.zeros((2, 23), jnp.int32)}, r"targets is int32 \(2, 23\)"),
        ({"targets": jnp.zeros((2, 24))}, r"targets is float32 .*: expected integers \(2, 24\)"),
        ({"weights": jnp.zeros((24,))}, r"weights is float32 \(24,\): expected float32 \(2, 24\)"),
        ({"weights": jnp.zeros((2, 24), jnp.bfloat16)}, "weights is bfloat16"),
        ({"backend": "cublas"}, "backend is 'cublas': use one of auto, mosaic_gpu, reference"),
    ],
)
def test_refuses(change, message):
    good = dict(zip(("hidden", "head", "targets", "weights"), draw(), strict=True))
    assert_refuses(linear_cross_entropy, good, change, message)
