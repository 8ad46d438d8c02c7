"""FP8 layers on weights cast beforehand: against the recipe written out, and near plain layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_experts import fp8_experts
from pallas_kernels.fp8_gauge import new_gauge
from pallas_kernels.fp8_layers import fp8_mlp, fp8_project
from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.fp8_weight import Fp8Weight, quantize_weight
from pallas_kernels.quantize import (
    dequantize,
    quantize_blocks,
    quantize_tiles,
    quantize_transposed,
    requantize_transposed,
)
from pallas_kernels.token_order import sort_by_expert
from tests.products import relative_error

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")

WRITTEN_OUT = 2e-3
"""Sums in another order move a few values to the neighbouring e4m3 number, 6 % away."""
PLAIN = {"project": 0.06, "mlp": 0.1, "experts": 0.1}
"""Against no rounding: a cast costs 2.6 %, a gradient of an MLP takes up to eight of them."""
T, D, F, E, K = 70, 144, 160, 5, 2


def draw(*shape, seed=0, dtype=jnp.float32):
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values * (shape[-2] ** -0.5 if seed else 1), dtype)


def cast(master, groups=0, inputs=1):
    gauge = new_gauge()
    return Fp8Weight(master, gauge, *quantize_weight(master, groups, inputs))


def rows(x, power_of_two=False):
    """x as 1 x 128 tiles in FP8 have it."""
    return dequantize(*quantize_tiles(x, power_of_two=power_of_two), jnp.float32)


def columns(x, power_of_two=False):
    return dequantize(*quantize_transposed(x, power_of_two=power_of_two), jnp.float32)[
        :, : len(x)
    ].T


def blocks(w):
    return dequantize(*quantize_blocks(w), jnp.float32, block_rows=128)


def mlp_by_hand(x, dy, gate_up, down, w):
    """Of the rows of one expert, x and dy being cast: out before w, and d_x, d_w and the rest."""
    first, second = blocks(gate_up), blocks(down)
    inner = x @ first
    out = rows(swiglu(inner)) @ second
    inner, d_h = rows(inner), dy @ second.T
    d_w = (d_h * swiglu(inner)).sum(axis=1)
    h, pull = jax.vjp(swiglu, inner)
    (d_inner,) = pull(d_h * w[:, None])
    h, d_inner = rows(h * w[:, None], True), rows(d_inner, True)
    d_down = columns(h, True).T @ columns(dy, True)
    d_gate_up = columns(x, True).T @ columns(d_inner, True)
    return out, d_inner @ first.T, d_w, d_gate_up, d_down


def swiglu(x):
    gate, up = jnp.split(x, 2, axis=1)
    return jax.nn.silu(gate) * up


def assert_near(found, expected, allowed):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) <= allowed


@functools.partial(jax.jit, static_argnums=0)
def forward_and_back(layer, operands, dy):
    out, pull = jax.vjp(layer, *operands)
    return out, pull(dy)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_projections_share_a_cast(power_of_two):
    x, w1, w2 = draw(T, D), draw(D, 3, 48, seed=1), draw(D, 80, seed=2)
    dy = draw(T, 144, seed=3), draw(T, 80, seed=4)

    def layer(x, w1, w2):
        return fp8_project(x, (cast(w1), cast(w2)), power_of_two=power_of_two)

    out, (d_x, *d_w) = forward_and_back(layer, (x, w1, w2), dy)
    flat = [w.reshape(D, -1) for w in (w1, w2)]
    x_q, w_q = rows(x, power_of_two), [blocks(w) for w in flat]
    assert_near(out, [x_q @ w for w in w_q], 1e-6)
    assert_near([d_x], [sum(rows(g) @ w.T for g, w in zip(dy, w_q, strict=True))], 1e-6)
    turned = columns(x_q, power_of_two)
    assert [g.shape for g in d_w] == [w1.shape, w2.shape]
    assert_near([g.reshape(D, -1) for g in d_w], [turned.T @ columns(g) for g in dy], 1e-6)
    assert_near(out, [x @ w for w in flat], PLAIN["project"])


def test_attention_output_has_two_axes_of_inputs():
    x, w = draw(T, 6 * 16), draw(6, 16, 48, seed=1)
    (out,) = fp8_project(x, (cast(w, inputs=2),))
    assert_near([out], [x @ w.reshape(96, 48)], PLAIN["project"])


def test_mlp():
    x, gate_up, down = draw(T, D), draw(D, 2 * F, seed=1), draw(F, D, seed=2)
    dy = draw(T, D, seed=3)
    layer = functools.partial(forward_and_back, lambda x, a, b: fp8_mlp(x, cast(a), cast(b)))
    out, grads = layer((x, gate_up, down), dy)
    one = jnp.ones(T)
    # Of the MLP without experts dy is cast along its rows for one product, its columns for another.
    by_hand, d_x, _, d_gate_up, _ = mlp_by_hand(rows(x, True), rows(dy), gate_up, down, one)
    assert_near([out, grads[0], grads[1]], [by_hand, d_x, d_gate_up], WRITTEN_OUT)
    plain, pull = jax.vjp(lambda x, a, b: swiglu(x @ a) @ b, x, gate_up, down)
    assert_near([out, *grads], [plain, *pull(dy)], PLAIN["mlp"])


def draw_experts(empty=1):
    """Experts of which one gets no token, weights, and all else of a layer."""
    rng = np.random.default_rng(5)
    others = [e for e in range(E) if e != empty]
    experts = jnp.asarray([rng.permutation(others)[:K] for _ in range(T)], jnp.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (T, K)), jnp.float32)
    return experts, weights, draw(T, D), draw(E, D, 2 * F, seed=1), draw(E, F, D, seed=2)


def experts_by_hand(experts, weights, x, gate_up, down, dy):
    x, cast_dy = rows(x, True), rows(dy, True)
    out, d_x, d_weights = jnp.zeros(x.shape), jnp.zeros(x.shape), jnp.zeros(weights.shape)
    d_gate_up, d_down = jnp.zeros(gate_up.shape), jnp.zeros(down.shape)
    for e in range(E):
        token, choice = np.nonzero(np.asarray(experts) == e)
        if not len(token):
            continue
        w = weights[token, choice]
        found = mlp_by_hand(x[token], cast_dy[token], gate_up[e], down[e], w)
        out = out.at[token].add(w[:, None] * found[0])
        d_x = d_x.at[token].add(found[1])
        d_weights = d_weights.at[token, choice].set(found[2])
        d_gate_up, d_down = d_gate_up.at[e].set(found[3]), d_down.at[e].set(found[4])
    return out, d_weights, d_x, d_gate_up, d_down


def test_experts():
    experts, *operands = draw_experts()
    dy = draw(T, D, seed=3)

    def layer(weights, x, gate_up, down):
        return fp8_experts(x, experts, weights, cast(gate_up, 1), cast(down, 1))

    def plain(weights, x, gate_up, down):
        gate, up = jnp.split(jnp.einsum("td,edf->etf", x, gate_up), 2, axis=-1)
        each = jnp.einsum("etf,efd->etd", jax.nn.silu(gate) * up, down)
        chosen = jax.nn.one_hot(experts, E) * weights[..., None]
        return jnp.einsum("tke,etd->td", chosen, each)

    out, grads = forward_and_back(layer, tuple(operands), dy)
    assert_near([out, *grads], experts_by_hand(experts, *operands, dy), WRITTEN_OUT)
    expected, pull = jax.vjp(plain, *operands)
    assert_near([out, *grads], [expected, *pull(dy)], PLAIN["experts"])
    assert not grads[2][1].any()
    assert not grads[3][1].any()


def test_shared_experts_are_an_mlp_beside():
    """The same bits as both layers; gradients but for the cast of dy, here of signs and exact."""
    experts, *operands = draw_experts()
    mlp = draw(D, 2 * F, seed=6), draw(F, D, seed=7)
    dy = jnp.sign(draw(T, D, seed=3))

    def together(weights, x, gate_up, down, *mlp):
        shared = tuple(cast(w) for w in mlp)
        return fp8_experts(x, experts, weights, cast(gate_up, 1), cast(down, 1), shared)

    def apart(weights, x, gate_up, down, *mlp):
        routed = fp8_experts(x, experts, weights, cast(gate_up, 1), cast(down, 1))
        return routed + fp8_mlp(x, *(cast(w) for w in mlp))

    out, grads = forward_and_back(together, (*operands, *mlp), dy)
    expected, wanted = forward_and_back(apart, (*operands, *mlp), dy)
    np.testing.assert_array_equal(out, expected)
    for one, other in zip(grads, wanted, strict=True):
        assert relative_error(one, other) <= WRITTEN_OUT
    assert all(np.asarray(grad).any() for grad in grads)


def test_experts_without_tokens_and_in_bfloat16():
    experts, weights, x, gate_up, down = draw_experts()
    weight = cast(gate_up, 1), cast(down, 1)
    out = fp8_experts(x.astype(jnp.bfloat16), experts, weights, *weight)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, fp8_experts(x, experts, weights, *weight)) < PLAIN["experts"]
    shared = cast(gate_up[0]), cast(down[0])
    assert fp8_experts(x[:0], experts[:0], weights[:0], *weight, shared).shape == (0, D)


@pytest.mark.parametrize("layer", ["linear", "project", "mlp", "experts", "shared"])
def test_what_jax_checkpoint_keeps_is_what_there_was(layer):
    """It rounds what a policy keeps, and e4m3 values of 256 and more, as each tile has, to NaN."""
    experts, weights, x, gate_up, down = draw_experts()
    routed, both = (cast(gate_up, 1), cast(down, 1)), (cast(gate_up[0]), cast(down[0]))
    run = {
        "linear": lambda x: fp8_linear(x, gate_up[0].T),
        "project": lambda x: fp8_project(x, (cast(gate_up[0]),))[0],
        "mlp": lambda x: fp8_mlp(x, cast(gate_up[0]), cast(down[0])),
        "experts": lambda x: fp8_experts(x, experts, weights, *routed),
        "shared": lambda x: fp8_experts(x, experts, weights, *routed, both),
    }[layer]
    policy = jax.checkpoint_policies.everything_saveable
    kept = jax.checkpoint(run, policy=policy)
    found, wanted = (jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(x) for f in (kept, run))
    np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(found).all()


def test_turning_tiles_of_powers_of_two_changes_nothing():
    x = draw(256, 128)
    q, scale = quantize_tiles(x, power_of_two=True)
    turned = requantize_transposed(q, scale, power_of_two=True)
    np.testing.assert_array_equal(
        dequantize(*turned, jnp.float32).T, dequantize(q, scale, jnp.float32)
    )


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-40])
def test_small_gradients_are_as_exact_as_large_ones(scale):
    """A mean over many tokens has such."""
    x, gate_up, down = draw(T, D), draw(D, 2 * F, seed=1), draw(F, D, seed=2)
    dy = draw(T, D, seed=3)
    layer = functools.partial(forward_and_back, lambda x, a, b: fp8_mlp(x, cast(a), cast(b)))
    _, large = layer((x, gate_up, down), dy)
    _, small = layer((x, gate_up, down), dy * scale)
    assert_near([g / scale for g in small], large, 1e-6)


def test_rows_are_sorted_by_expert_in_the_tokens_order():
    experts = jnp.asarray([[2, 0], [0, 3], [2, 3]], jnp.int32)
    order = sort_by_expert(experts, 5)
    np.testing.assert_array_equal(order.sizes, [2, 0, 2, 2, 0])
    np.testing.assert_array_equal(order.tokens, [0, 1, 0, 2, 1, 2])
    np.testing.assert_array_equal(order.slots, [[2, 0], [1, 4], [3, 5]])


def test_gauge_counts_what_is_lost():
    x = np.ones((4, 256), np.float32)
    x[:, 1:33] = 1e-9  # of the first of two tiles a quarter
    x[0, 200] = np.nan
    w, dy = draw(256, 32, seed=1), jnp.zeros((4, 32))
    _, pull = jax.vjp(lambda w: fp8_project(jnp.asarray(x), (w,)), cast(w))
    (found,) = pull((dy,))
    np.testing.assert_allclose(found.gauge, [1 / 8, 1, 1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fp8_project(draw(3, 32), (cast(draw(48, 16)),)), r"\(3, 32\).*\(48, 16\)"),
        (lambda: fp8_project(draw(3, 32, dtype=jnp.float16), (cast(draw(32, 16)),)), "float16"),
        (lambda: fp8_mlp(draw(3, 32), cast(draw(32, 64)), cast(draw(48, 32))), r"\(48, 32\)"),
        (lambda: cast(draw(4, 16), groups=1), r"groups is 1, inputs is 1.*\(4, 16\)"),
        (lambda: cast(draw(16, 16))[0], "index is 0"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("wrong", ["experts", "weights", "x", "down"])
def test_experts_refuse_what_does_not_fit(wrong):
    experts, weights, x, gate_up, down = draw_experts()
    given = {"experts": experts, "weights": weights, "x": x, "down": cast(down, 1)}
    given[wrong] = given[wrong][:3] if wrong != "down" else cast(down[:, :32], 1)
    with pytest.raises(ValueError, match=r"expected"):
        fp8_experts(given["x"], given["experts"], given["weights"], cast(gate_up, 1), given["down"])


@pytest.mark.parametrize("wrong", [0, 1])
def test_shared_experts_refuse_what_does_not_fit(wrong):
    experts, weights, x, gate_up, down = draw_experts()
    shared = [cast(gate_up[0]), cast(down[0])]
    shared[wrong] = cast(draw(32, 32))
    with pytest.raises(ValueError, match=r"shared (gate_up|down) is .* expected"):
        fp8_experts(x, experts, weights, cast(gate_up, 1), cast(down, 1), tuple(shared))
