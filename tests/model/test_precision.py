"""The FP8 policy: which weights, how near BF16, what the backward pass keeps."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.model import Transformer
from dsjax.model.float32 import float32_product
from dsjax.model.mla import Mla
from dsjax.model.moe import Mlp, Moe, swiglu
from dsjax.model.precision import (
    fp8_gauges,
    fp8_values,
    project,
    project_all,
    with_fp8,
)
from dsjax.model.router import RouterBias
from pallas_kernels.fp8_layers import fp8_mlp
from pallas_kernels.fp8_weight import Fp8Weight
from tests.tiny import CONFIG, random_tokens, random_transformer, randomise

HIGH = {"embed", "head", "norm", "attn_norm", "mlp_norm", "kv_norm", "q_norm", "enorm", "hnorm",
        "weight"}  # fmt: skip
"""Parameters that stay out of FP8 (V3 report, section 3.3.1); `weight` is the router's."""
FITTING = {"kv_lora_rank": 32, "qk_nope_dim": 16, "qk_rope_dim": 16, "v_dim": 16}
MLP_CAST = 0.12
"""Relative error of an MLP's results and gradients: up to eight casts of 2.6 % each."""


def names(tree) -> dict[str, object]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    }


def params_of(module: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def in_fp8(module: nnx.Module) -> nnx.Module:
    """The module with its weights cast, as a training step has them."""
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    plain = nnx.to_pure_dict(params)
    cast = with_fp8(plain, fp8_gauges(plain), fp8_values(plain))
    nnx.replace_by_pure_dict(params, cast)
    return nnx.merge(graph, params, rest)


def relative_error(found, expected) -> float:
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_every_linear_layer_and_expert_is_fp8_and_nothing_else():
    model = random_transformer(q_lora_rank=16, mtp_depth=1, **FITTING)
    values = jax.eval_shape(fp8_values, params_of(model))
    found = names(jax.tree.map(lambda _: True, values, is_leaf=lambda x: isinstance(x, tuple)))
    high = {name.split(".")[-1] for name, cast in found.items() if cast is None}
    low = {name.split(".")[-1] for name, cast in found.items() if cast}
    assert high == HIGH
    assert low == {"q_down", "q_up", "kv_down", "kv_up", "out", "gate_up", "down", "project"}


def test_values_and_gauges_keep_the_axes_of_layers_and_experts():
    params = params_of(random_transformer(layers=3, dense_layers=1, **FITTING))
    values, gauges = jax.eval_shape(fp8_values, params), jax.eval_shape(fp8_gauges, params)
    down = values["moe"]["mlp"]["experts"]["down"]
    assert [leaf.shape for leaf in down] == [(2, 8, 16, 32), (2, 8, 1, 1), (2, 8, 32, 16)]
    out = values["dense"]["attn"]["out"]
    assert [leaf.shape for leaf in out] == [(1, 32, 32), (1, 1, 1), (1, 32, 32)]
    assert gauges["moe"]["mlp"]["experts"]["down"].shape == (2, 3)


@pytest.mark.parametrize("equation", ["btd,dhq->bthq", "btd,dw->btw", "...d,dw->...w"])
def test_project_is_the_einsum_of_what_fp8_holds(equation):
    rng = np.random.default_rng(0)
    shape = (32, 4, 12) if "h" in equation else (32, 48)
    x = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    name = "q" if len(shape) == 3 else "down"
    weight = with_fp8({name: w}, fp8_gauges({name: w}), fp8_values({name: w}))[name]
    assert isinstance(weight, Fp8Weight)
    found = project(equation, x, weight)
    expected = project(equation, x.astype(jnp.float32), w)
    assert (found.shape, found.dtype) == (expected.shape, x.dtype)
    assert relative_error(found, expected) < 0.06


def test_the_input_of_several_weights_is_kept_once():
    params = {"q": jnp.ones((256, 2, 64)), "kv_down": jnp.ones((256, 144))}
    weights = with_fp8(params, fp8_gauges(params), fp8_values(params))

    def layer(x):
        pair = weights["q"], weights["kv_down"]
        return project_all(("btd,dhq->bthq", "btd,dw->btw"), x, pair)

    x = jax.ShapeDtypeStruct((2, 512, 256), jnp.bfloat16)
    assert kept_bytes(layer, x, weights) <= 0.55 * 2 * math.prod(x.shape)


def kept_bytes(layer, x, weights) -> int:
    """Bytes of what a layer's backward pass keeps, its weights not counted."""
    pull = jax.eval_shape(lambda x: jax.vjp(layer, x)[1], x)
    shapes = {leaf.shape for leaf in jax.tree.leaves(weights)}
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape not in shapes]
    assert kept
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)


def with_gradients(layer):
    """Its result, and the gradient of the sum of its squares."""
    gradient = jax.grad(lambda *operands: (layer(*operands) ** 2).sum(), (0, 1))
    return jax.jit(lambda *operands: (layer(*operands), gradient(*operands)))


@pytest.mark.parametrize(("width", "cast"), [(2000, 2048), (272, 272)])
def test_swiglu_is_widened_to_whole_tiles_where_that_adds_little(width, cast):
    rng = np.random.default_rng(1)
    params = {
        "gate_up": jnp.asarray(rng.normal(size=(32, 2 * width)) / 6, jnp.float32),
        "down": jnp.asarray(rng.normal(size=(width, 32)) / 45, jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(40, 32)), jnp.float32)

    def fp8(params, x):
        weights = with_fp8(params, fp8_gauges(params), fp8_values(params))
        return fp8_mlp(x, weights["gate_up"], weights["down"])

    def plain(params, x):
        return swiglu(x @ params["gate_up"]) @ params["down"]

    shapes = {name: leaf[0].shape for name, leaf in jax.eval_shape(fp8_values, params).items()}
    assert shapes == {"gate_up": (32, 2 * cast), "down": (cast, 32)}
    found, expected = (jax.tree.leaves(with_gradients(layer)(params, x)) for layer in (fp8, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert relative_error(one, other) < 0.12


def test_inputs_of_linear_layers_take_about_half_of_bf16s_memory():
    """By what the backward pass of a SwiGLU MLP keeps: its input and what enters SwiGLU."""
    t, d, f = 640, 256, 512
    mlp = nnx.eval_shape(lambda: Mlp(d, f, 0.1, rngs=nnx.Rngs(0), param_dtype=jnp.float32))
    x, sizes = jax.ShapeDtypeStruct((1, t, d), jnp.bfloat16), []
    for module in (mlp, jax.eval_shape(in_fp8, mlp)):
        graph, state = nnx.split(module)

        def pulled(x, state, graph=graph):
            return jax.vjp(lambda x, state: nnx.merge(graph, state)(x), x, state)[1]

        kept = jax.tree.leaves(jax.eval_shape(pulled, x, state))
        activations = [leaf for leaf in kept if t in leaf.shape]
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in activations))
    plain, fp8 = sizes
    assert plain == 2 * t * (d + 2 * f + f)
    assert fp8 == t * (d + 2 * f) * (1 + 4 / 128)
    assert fp8 <= 0.55 * 2 * t * (d + 2 * f)


def test_moe_layer_is_near_float32():
    layer = randomise(nnx.eval_shape(
        lambda: Moe(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    ))  # fmt: skip
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64, 32)), jnp.float32)
    dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    plain = nnx.to_pure_dict(params)

    def run(cast, plain, x):
        state = jax.tree.map(lambda x: x, params)
        gauges, values = fp8_gauges(plain), fp8_values(plain)
        nnx.replace_by_pure_dict(state, with_fp8(plain, gauges, values) if cast else plain)
        return nnx.merge(graph, state, rest)(x)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def both(cast, plain, x):
        out, pull = jax.vjp(functools.partial(run, cast), plain, x)
        return out, *pull(dy)

    for found, expected in zip(
        jax.tree.leaves(both(True, plain, x)), jax.tree.leaves(both(False, plain, x)), strict=True
    ):
        assert relative_error(found, expected) < MLP_CAST


def test_model_in_fp8_is_near_the_model_in_bf16():
    tokens = random_tokens(2, 24)
    model = random_transformer(precision="fp8", q_lora_rank=16, layers=2, dense_layers=2, **FITTING)
    plain = model(tokens)
    assert model.embedded(tokens).dtype == jnp.bfloat16
    cast = jax.jit(lambda m, t: m(t))(in_fp8(model), tokens)
    assert 1e-3 < relative_error(cast, plain) < 0.2
    assert isinstance(in_fp8(model).dense.attn, Mla)


def test_fp8_values_pass_no_gradient_and_masters_get_theirs():
    model = random_transformer(layers=1, dense_layers=0, precision="fp8", **FITTING)
    graph, params, bias = nnx.split(model, nnx.Param, RouterBias)
    plain = nnx.to_pure_dict(params)
    tokens = random_tokens(1, 16)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(plain, gauges, tokens):
        state = jax.tree.map(lambda x: x, params)
        nnx.replace_by_pure_dict(state, with_fp8(plain, gauges, fp8_values(plain)))
        found: Transformer = nnx.merge(graph, state, bias)
        return (found(tokens) ** 2).mean()

    grads, counts = gradient(plain, fp8_gauges(plain), tokens)
    assert jax.tree.structure(grads) == jax.tree.structure(plain)
    for name, leaf in names(grads).items():
        assert leaf.dtype == jnp.float32
        assert leaf.any(), name
    for name, leaf in names(counts).items():
        if leaf is not None:
            assert (leaf[..., :2] < 0.2).all(), name
            assert not leaf[..., 2].any(), name


def test_a_width_that_fp8_cannot_take_is_refused_by_name():
    params = params_of(random_transformer())
    with pytest.raises(ValueError, match=r"dense.attn.kv_down is 32 wide in and 20 out.*16"):
        fp8_values(params)


def test_float32_product_of_bfloat16_is_as_exact_as_float32():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(96, 256)), jnp.bfloat16)
    w, grad = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((256, 24), (96, 24)))
    found, pull = jax.vjp(jax.jit(float32_product), x, w)
    d_x, d_w = pull(grad)
    exact_x, exact_w, exact_grad = (np.asarray(a, np.float64) for a in (x, w, grad))
    assert (found.dtype, d_x.dtype, d_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert relative_error(found, exact_x @ exact_w) < 3e-7
    assert relative_error(d_w, exact_x.T @ exact_grad) < 3e-7
    assert relative_error(d_x, exact_grad @ exact_w.T) < 2e-3  # rounded to bfloat16
    wide = float32_product(x.astype(jnp.float32), w)
    assert relative_error(wide, exact_x @ exact_w) < 3e-7
