"""The whole model: cached decoding, multi-token prediction, precision, rematerialisation."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import Yarn
from dsjax.model import LOCAL, LatentCache, RouterBias, Transformer, block
from dsjax.model.block import Block, stack_blocks
from dsjax.model.rope import rotation
from pallas_kernels import device, sm90_mla_plan
from tests.tiny import CONFIG, random_tokens, random_transformer

VARIANTS = {
    "v3": {"q_lora_rank": 12, "yarn": Yarn(factor=8.0, original_context=16), "mtp_depth": 2},
    "no dense layers, no shared experts": {
        "dense_layers": 0, "layers": 2, "heads": 3, "v_dim": 12, "shared_experts": 0
    },
    "no MoE layers": {"dense_layers": 2, "layers": 2},
}  # fmt: skip
LENGTHS, PADDED, NEW, CAPACITY = (3, 8, 5), 8, 6, 16


@jax.jit
def forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return model(tokens)


@functools.partial(jax.jit, static_argnums=(3, 4))
def continued(
    model: Transformer, tokens: jax.Array, lengths: jax.Array, piece: int, capacity: int = CAPACITY
) -> tuple:
    """Logits after each prompt and after each of the NEW tokens behind it, `piece` at a time."""
    after, cache = model.prefill(tokens[:, :PADDED], lengths, capacity)
    at = lengths[:, None] + jnp.arange(NEW)
    new = jnp.take_along_axis(tokens, at, axis=1)

    def step(cache: LatentCache, tokens: jax.Array) -> tuple[LatentCache, jax.Array]:
        logits, cache = model.decode(tokens, cache)
        return cache, logits

    pieces = new.reshape(len(tokens), -1, piece).swapaxes(0, 1)
    cache, logits = jax.lax.scan(step, cache, pieces)
    return after, logits.swapaxes(0, 1).reshape(len(tokens), NEW, -1), cache.lengths


def assert_close(found: jax.Array, expected: jax.Array, tolerance: float = 1e-5) -> None:
    difference = float(jnp.abs(found - expected).max())
    assert difference <= tolerance * float(jnp.abs(expected).max())


@pytest.mark.parametrize(
    ("case", "piece"),
    [
        ("v3", 3),
        ("no dense layers, no shared experts", 1),
        ("no MoE layers", 2),
    ],
)
def test_decoding_equals_the_full_forward_for_prompts_of_any_length(case, piece):
    model = random_transformer(**VARIANTS[case])
    tokens, lengths = random_tokens(len(LENGTHS), PADDED + NEW), jnp.array(LENGTHS)
    full = forward(model, tokens)
    after, logits, end = continued(model, tokens, lengths, piece)
    for row, length in enumerate(LENGTHS):
        assert_close(after[row], full[row, length - 1])
        assert_close(logits[row], full[row, length : length + NEW])
    np.testing.assert_array_equal(end, lengths + NEW)


PUBLISHED = {"kv_lora_rank": 512, "qk_rope_dim": 64}


def test_decoding_in_pages_equals_the_full_forward():
    """All experts are chosen, as rounding may change the choice of some."""
    model = random_transformer(precision="bf16", top_k=8, top_groups=4, **PUBLISHED)
    tokens, lengths = random_tokens(len(LENGTHS), PADDED + NEW), jnp.array(LENGTHS)
    full = forward(model, tokens)
    _, logits, end = continued(model, tokens, lengths, 2, 64)
    at = lengths[:, None] + jnp.arange(NEW)
    expected = jnp.take_along_axis(full, at[..., None], axis=1)
    assert jnp.sqrt(jnp.mean((logits - expected) ** 2) / jnp.mean(expected**2)) < 0.02
    np.testing.assert_array_equal(end, lengths + NEW)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_decoding_does_not_copy_the_cache(precision):
    """In pages and in rows: what a step needs beside the donated cache is a few layers of it."""
    config = replace(CONFIG, layers=16, dense_layers=2, **PUBLISHED)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), precision=precision))
    dtype = {"bf16": jnp.bfloat16, "fp32": jnp.float32}[precision]
    latents = jax.ShapeDtypeStruct((16, 32, 1024, 576), dtype)
    cache = LatentCache(latents, jax.ShapeDtypeStruct((32,), jnp.int32))
    tokens = jax.ShapeDtypeStruct((32, 2), jnp.int32)
    step = jax.jit(Transformer.decode, donate_argnums=2).lower(model, tokens, cache)
    memory, size = step.compile().memory_analysis(), latents.size * latents.dtype.itemsize
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 4


def test_on_hopper_a_step_makes_one_plan_and_a_layer_runs_three_kernels(monkeypatch):
    """Write, decode and sum of parts, in one loop over the layers."""
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)
    made, plan = [], sm90_mla_plan.plan
    monkeypatch.setattr(sm90_mla_plan, "plan", lambda *of: made.append(of[1:]) or plan(*of))
    config = replace(CONFIG, **VARIANTS["no MoE layers"], **PUBLISHED)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), precision="bf16"))
    latents = jax.ShapeDtypeStruct((2, 3, 128, 576), jnp.bfloat16)
    cache = LatentCache(latents, jax.ShapeDtypeStruct((3,), jnp.int32))
    traced = jax.jit(Transformer.decode).trace(
        model, jax.ShapeDtypeStruct((3, 2), jnp.int32), cache
    )
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
    assert len(made) == 1


def test_what_stands_behind_a_prompt_does_not_matter():
    model, lengths = random_transformer(**VARIANTS["v3"]), jnp.array(LENGTHS)
    tokens = random_tokens(len(LENGTHS), PADDED + NEW)
    other = tokens.at[0, 3 + NEW :].set(1).at[2, 5 + NEW :].set(2)
    for found, expected in zip(continued(model, other, lengths, 3),
                               continued(model, tokens, lengths, 3), strict=True):  # fmt: skip
        np.testing.assert_array_equal(found, expected)


def test_logits_do_not_see_later_tokens():
    model, tokens = random_transformer(**VARIANTS["v3"]), random_tokens(3, PADDED + NEW)
    changed = forward(model, tokens.at[:, 9].add(1) % CONFIG.vocab_size)
    full = forward(model, tokens)
    assert_close(changed[:, :9], full[:, :9], 1e-6)
    assert jnp.abs(changed[:, 9:] - full[:, 9:]).max(axis=-1).min() > 1e-3


def test_cache_holds_one_latent_a_layer_and_token():
    model = random_transformer()
    _, cache = jax.eval_shape(lambda: model.prefill(random_tokens(2, 8), jnp.array([8, 8]), 32))
    assert cache.latents.shape == (CONFIG.layers, 2, 32, CONFIG.latent_dim)


def rms(x: np.ndarray, weight: nnx.Param) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * np.asarray(weight[...])


def test_each_mtp_depth_joins_embedding_then_the_hidden_state_before_it():
    model, tokens = random_transformer(**VARIANTS["v3"]), random_tokens(2, 10)
    following = jnp.stack([tokens[:, 1:9], tokens[:, 2:10]])
    hidden = jax.random.normal(jax.random.key(2), (2, 8, CONFIG.dim))
    states, stats = jax.jit(Transformer.predict_further)(model, hidden, following)
    assert len(states) == 2
    assert stats.load_E.shape == (2, CONFIG.experts)
    turn, run_block = rotation(model.config, jnp.arange(8)[None]), jax.jit(
        lambda block, x, turn: block(x, turn, LOCAL)[0]
    )  # fmt: skip
    before = np.asarray(hidden)
    for mtp, later, found in zip(model.mtp, following, states, strict=True):
        embedded = np.asarray(model.embed[...])[np.asarray(later)]
        upper, lower = np.split(np.asarray(mtp.project[...]), 2)
        x = rms(embedded, mtp.enorm) @ upper + rms(before, mtp.hnorm) @ lower
        expected = rms(np.asarray(run_block(mtp.block, jnp.asarray(x), turn)), mtp.norm)
        assert_close(found, expected)
        before = expected


def test_mtp_needs_one_row_of_following_tokens_a_depth():
    model = random_transformer(mtp_depth=2)
    with pytest.raises(ValueError, match="zip"):
        jax.eval_shape(
            model.predict_further, jnp.zeros((1, 4, CONFIG.dim)), jnp.zeros((1, 1, 4), jnp.int32)
        )


def test_without_mtp_nothing_further_is_predicted():
    model = random_transformer()
    states, stats = model.predict_further(jnp.zeros((1, 4, 32)), jnp.zeros((0, 1, 4), jnp.int32))
    assert (states, stats) == ([], None)


def nats(model: Transformer, tokens: jax.Array, remat: str) -> jax.Array:
    logits = model.logits(model.hidden(tokens[:, :-1], remat=remat)[0])
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - chosen).mean()


def slopes(model: Transformer, tokens: jax.Array, remat: str) -> list[jax.Array]:
    return jax.tree.leaves(jax.jit(jax.grad(nats), static_argnums=2)(model, tokens, remat))


@pytest.mark.parametrize("remat", ["dots", "v3", "layer"])
def test_rematerialising_changes_no_gradient(remat):
    model, tokens = (
        random_transformer(layers=1, dense_layers=0, shared_experts=0),
        random_tokens(2, 6),
    )
    plain = slopes(model, tokens, "none")
    assert max(float(jnp.abs(leaf).max()) for leaf in plain) > 0.01
    for found, expected in zip(slopes(model, tokens, remat), plain, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_scanned_layers_are_those_written_out(monkeypatch):
    model, tokens = random_transformer(layers=2, dense_layers=0), random_tokens(2, 6)
    written, routed = slopes(model, tokens, "none"), model.hidden(tokens)[1]
    monkeypatch.setattr(block, "WRITTEN_OUT", 1)
    for found, expected in zip(slopes(model, tokens, "none"), written, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    for found, expected in zip(model.hidden(tokens)[1], routed, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "v3", "layer"])
@pytest.mark.parametrize("written_out", [0, 2])
def test_each_kind_of_layer_is_rematerialised_if_asked(monkeypatch, remat, written_out):
    """Equal layers are one program, scanned or written out."""
    monkeypatch.setattr(block, "WRITTEN_OUT", written_out)
    program = jax.make_jaxpr(functools.partial(nats, remat=remat))(
        random_transformer(layers=3, dense_layers=1), random_tokens(2, 9)
    )
    found = str(program).count("remat2[") + str(program).count("checkpoint[")
    assert found == (0 if remat == "none" else 2)


def kept_for_the_backward_pass(remat: str) -> int:
    """Bytes of what is kept of 3 layers, parameters and what all of them share included."""
    model = nnx.eval_shape(lambda: Transformer(
        replace(CONFIG, dense_layers=0, q_lora_rank=16), rngs=nnx.Rngs(0), precision="bf16"
    ))  # fmt: skip
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def pulled(model, tokens):
        return jax.vjp(lambda m: m.hidden(tokens, remat=remat)[0], model)[1]

    kept = jax.tree.leaves(jax.eval_shape(pulled, model, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_v3s_rematerialisation_keeps_more_than_none_of_a_layer_and_less_than_all():
    least, v3, most = map(kept_for_the_backward_pass, ("layer", "v3", "none"))
    assert least < v3 < 0.85 * most


def test_bf16_stays_close_to_fp32_and_gives_float32_logits():
    changes, tokens = VARIANTS["no MoE layers"], random_tokens(3, PADDED + NEW)
    exact = forward(random_transformer(**changes), tokens)
    found = forward(random_transformer(precision="bf16", **changes), tokens)
    assert found.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((found - exact) ** 2) / jnp.mean(exact**2))
    assert 1e-4 < error < 0.06


@pytest.mark.parametrize(
    "tokens", [jnp.ones((1, 4), jnp.float16), jnp.ones((1, 4)), jnp.ones((4,), jnp.int32)]
)
def test_tokens_must_be_integers_in_batches(tokens):
    with pytest.raises(ValueError, match=str(tokens.dtype)) as refusal:
        random_transformer()(tokens)
    assert str(tokens.shape) in str(refusal.value)


@pytest.mark.parametrize("precision", ["fp16", "float32", "float8"])
def test_unknown_precision_is_refused(precision):
    with pytest.raises(ValueError, match=precision):
        Transformer(CONFIG, rngs=nnx.Rngs(0), precision=precision)


def test_router_bias_is_no_parameter():
    model = random_transformer(mtp_depth=1)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    biases = [path for path, _ in nnx.to_flat_state(nnx.state(model, RouterBias))]
    assert not [path for path in paths if "bias" in path]
    assert biases == [
        ("moe", "mlp", "router", "bias"),
        ("mtp", 0, "block", "mlp", "router", "bias"),
    ]


def test_weights_of_each_layer_start_normal_with_init_std_and_norms_at_one():
    @jax.jit
    def build() -> Block:
        kinds = {"rngs": nnx.Rngs(0), "param_dtype": jnp.dtype(jnp.float32)}
        return stack_blocks(2, replace(CONFIG, init_std=0.05), False, **kinds)

    layers = build()
    for path, leaf in nnx.to_flat_state(nnx.state(layers, nnx.Param)):
        if "norm" in str(path[-1]):
            assert (leaf[...] == 1).all(), path
        else:
            assert float(leaf[...].std()) == pytest.approx(0.05, rel=0.15), path
            assert float(jnp.abs(leaf[0] - leaf[1]).max()) > 0.05, path
