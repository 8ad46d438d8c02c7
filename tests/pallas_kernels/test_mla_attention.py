"""The attention of prefill and training against a plain float64 softmax, and what it refuses."""

import functools
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    device,
    mla_attention_cudnn,
    mla_attention_reference,
    sm90_mla_backward,
    sm90_mla_prefill,
)
from pallas_kernels.mla_attention import mla_attention

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")
door = sys.modules[mla_attention.__module__]
card = device.compute_capability  # that of this process, for the tests that need it
SCALE = 0.3
attend = functools.partial(mla_attention, scale=SCALE)


def inputs(t, s=None, b=2, h=3, dq=24, dv=16, dtype=jnp.float32, seed=0):
    """q, k, v, and cotangents of out and lse."""
    rng = np.random.default_rng(seed)
    s = t if s is None else s
    shapes = (b, t, h, dq), (b, s, h, dq), (b, s, h, dv), (b, t, h, dv)
    draws = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return *draws, jnp.asarray(rng.standard_normal((b, h, t)), jnp.float32)


def causal(t, s=None):
    s = t if s is None else s
    return np.tri(t, s, s - t, dtype=bool)[None]


def same(ids):
    ids = np.asarray(ids)
    return ids[:, :, None] == ids[:, None, :]


def plain(q, k, v, seen, scale=SCALE):
    """float64, of the whole matrix of scores; `seen` is bool [b or 1, t, s]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bihq,bjhq->bhij", q, k) * scale
    scores = np.where(seen[:, None], scores, -np.inf)
    most = np.maximum(scores.max(-1, keepdims=True), -1e300)
    weights = np.exp(scores - most)
    total = weights.sum(-1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + most[..., 0], np.inf)
    out = np.einsum("bhij,bjhv->bihv", weights / np.maximum(total, 1e-300)[..., None], v)
    return out, lse


def assert_attends(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def pulled(function, operands, *cotangents):
    """out, lse and the gradients."""

    def both(*operands):
        found, pull = jax.vjp(function, *operands)
        return *found, *pull(cotangents)

    return jax.jit(both)(*operands)


def ids_of(lengths, rows=1):
    return jnp.asarray(np.tile(np.repeat(np.arange(len(lengths)), lengths), (rows, 1)), jnp.int32)


@pytest.mark.parametrize("t", [1, 5, 512, 700])
def test_causal(t):
    q, k, v, *_ = inputs(t, b=1, h=2)
    assert_attends(attend(q, k, v), plain(q, k, v, causal(t)))


@pytest.mark.parametrize(("t", "s"), [(7, 7), (5, 12), (12, 5), (1, 600), (600, 1)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_as_many_keys_as_you_like(t, s, is_causal):
    q, k, v, *_ = inputs(t, s)
    seen = causal(t, s) if is_causal else np.ones((1, t, s), bool)
    out, lse = attend(q, k, v, causal=is_causal)
    assert_attends((out, lse), plain(q, k, v, seen))
    nothing = ~seen[0].any(-1)
    assert not np.asarray(out)[:, nothing].any()
    assert np.isposinf(np.asarray(lse)[:, :, nothing]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats(dtype):
    q, k, v, *_ = inputs(70, dtype=dtype)
    out, lse = attend(q, k, v)
    assert out.dtype == dtype
    assert lse.dtype == jnp.float32
    expected = plain(q, k, v, causal(70))
    assert_attends([lse], expected[1:], 1e-4)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected[0], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_segments(is_causal):
    ids = jnp.array([[7] * 30 + [3] * 1 + [-2] * 39, [0] * 70], jnp.int32)
    q, k, v, *_ = inputs(70)
    seen = same(ids) & (causal(70) if is_causal else True)
    found = attend(q, k, v, segment_ids=ids, causal=is_causal)
    assert_attends(found, plain(q, k, v, seen))
    alone = attend(*(x[:1, 31:] for x in (q, k, v)), causal=is_causal)
    assert_attends([x[:1] for x in (found[0][:, 31:], found[1][..., 31:])], alone, 1e-6)


@pytest.mark.parametrize("lengths", [[30, 1, 39], [0, 70, 0], [1, 0, 0, 68, 1], [70]])
@pytest.mark.parametrize("is_causal", [True, False])
def test_cu_seqlens_are_segments(lengths, is_causal):
    q, k, v, *_ = inputs(70, b=1)
    rope = k[:, :, 0, -8:]
    bounds = jnp.array([0, *np.cumsum(lengths)], jnp.int32)
    run = functools.partial(attend, k_rope=rope[0], cu_seqlens=bounds, causal=is_causal)
    found = run(q[0], k[0, ..., :-8], v[0])
    run = functools.partial(attend, k_rope=rope, segment_ids=ids_of(lengths), causal=is_causal)
    assert_attends(found, [x[0] for x in run(q, k[..., :-8], v)], 0)
    traced = jax.jit(lambda bounds: attend(q[0], k[0], v[0], cu_seqlens=bounds))(bounds)
    assert_attends(traced, attend(q[0], k[0], v[0], cu_seqlens=bounds), 1e-6)


def test_shared_rotary_keys_are_copies():
    q, k, v, d_out, d_lse = inputs(40)
    rope = inputs(40, dq=8, seed=9)[0][:, :, 0]

    def shared(q, k, rope, v):
        return attend(q, k, v, k_rope=rope)

    def copied(q, k, rope, v):
        copies = jnp.broadcast_to(rope[:, :, None], (*k.shape[:3], 8))
        return attend(q, jnp.concatenate([k, copies], -1), v)

    operands = q, k[..., :-8], rope, v
    found = pulled(shared, operands, d_out, d_lse)
    assert_attends(found, pulled(copied, operands, d_out, d_lse))


@pytest.mark.parametrize("rope", [0, 8])
def test_values_behind_keys_are_values(rope):
    q, k, v, d_out, d_lse = inputs(40)
    k_rope = inputs(40, dq=8, seed=9)[0][:, :, 0] if rope else None
    kv = jnp.concatenate([k[..., : k.shape[-1] - rope], v], axis=-1)

    def together(q, kv):
        return attend(q, kv, None, k_rope=k_rope)

    def apart(q, kv):
        k, v = jnp.split(kv, [24 - rope], axis=-1)
        return attend(q, k, v, k_rope=k_rope)

    found = pulled(together, (q, kv), d_out, d_lse)
    assert_attends(found, pulled(apart, (q, kv), d_out, d_lse), 0)
    bounds = jnp.array([0, 15, 40], jnp.int32)
    packed = [attend(q[0], x[0], y, cu_seqlens=bounds, k_rope=None if k_rope is None else k_rope[0])
              for x, y in ((kv, None), (kv[..., :-16], v[0]))]  # fmt: skip
    assert_attends(packed[0], packed[1], 0)


def whole(q, k, v, seen):
    """The same in jnp, for JAX to differentiate."""
    scores = jnp.einsum("bihq,bjhq->bhij", q, k, precision="highest") * SCALE
    scores = jnp.where(seen[:, None], scores, -1e30)
    out = jnp.einsum("bhij,bjhv->bihv", jax.nn.softmax(scores), v, precision="highest")
    return out, jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize("lse_too", [False, True])
@pytest.mark.parametrize(
    ("t", "s", "options"),
    [(1, 1, {}), (600, 600, {}), (5, 9, {}), (6, 9, dict(causal=False)),
     (70, 70, dict(segment_ids=ids_of([30, 1, 39], 2))),
     (70, 70, dict(segment_ids=ids_of([30, 1, 39], 2), causal=False))],
)  # fmt: skip
def test_gradients(t, s, options, lse_too):
    q, k, v, d_out, d_lse = inputs(t, s)
    seen = causal(t, s) if options.get("causal", True) else np.ones((1, t, s), bool)
    if "segment_ids" in options:
        seen = seen & same(options["segment_ids"])
    seen, d_lse = jnp.asarray(seen), d_lse if lse_too else jnp.zeros_like(d_lse)
    expected = pulled(functools.partial(whole, seen=seen), (q, k, v), d_out, d_lse)
    if lse_too:
        found = pulled(functools.partial(attend, **options), (q, k, v), d_out, d_lse)
    else:  # lse is left out of what is differentiated
        out, pull = jax.vjp(lambda *x: attend(*x, **options)[0], q, k, v)
        found, expected = (out, *pull(d_out)), (expected[0], *expected[2:])
    assert_attends(found, expected, 1e-4)


def test_queries_that_see_nothing_have_no_gradient():
    q, k, v, d_out, d_lse = inputs(6, 4)
    _, lse, d_q, *found = pulled(attend, (q, k, v), d_out, d_lse)
    assert np.isposinf(lse[..., :2]).all()
    assert not np.asarray(d_q[:, :2]).any()
    expected = pulled(attend, (q[:, 2:], k, v), d_out[:, 2:], d_lse[..., 2:])[2:]
    assert_attends([d_q[:, 2:], *found], expected, 1e-6)


@pytest.mark.parametrize("axis", ["b", "t", "s", "h"])
def test_sizes_of_zero(axis):
    shape = dict(dict(b=2, t=3, s=3, h=2), **{axis: 0})
    q, k, v, *_ = inputs(**shape)
    (out, lse), pull = jax.vjp(functools.partial(attend, causal=False), q, k, v)
    assert out.shape == (*q.shape[:3], v.shape[-1])
    assert lse.shape == (shape["b"], shape["h"], shape["t"])
    assert not np.asarray(out).any()
    assert np.isposinf(lse).all()
    assert [x.shape for x in pull((out, lse))] == [q.shape, k.shape, v.shape]


def interpreted(monkeypatch):
    """The door as on Hopper, with the kernel in the interpreter.

    The backward kernel can only tell whom a key is seen by if intervals never fall.
    """
    monkeypatch.setattr(door, "takes_kernels", lambda backend: backend != "reference")
    kernel, back = sm90_mla_prefill.forward, sm90_mla_backward.backward

    def run(q, k, k_rope, v, low, high, plain, **options):
        for ends in () if plain else (low, high):
            jax.debug.callback(lambda ends: rising.append((np.diff(ends) >= 0).all()), ends)
        interpret = plgpu.InterpretGPUParams()
        return kernel(q, k, k_rope, v, low, high, plain, interpret=interpret, sms=2, **options)

    def run_back(*operands, **options):
        return back(*operands, interpret=plgpu.InterpretGPUParams(), sms=2, **options)

    rising = []
    monkeypatch.setattr(sm90_mla_prefill, "forward", run)
    monkeypatch.setattr(sm90_mla_backward, "backward", run_back)
    return rising


@pytest.mark.parametrize(
    ("t", "s", "options"),
    [(130, 130, {}), (100, 130, {}), (130, 130, dict(segment_ids=ids_of([50, 80])))],
)
def test_what_is_no_whole_tile_is_filled(t, s, options, monkeypatch):
    rising = interpreted(monkeypatch)
    q, k, v, d_out, d_lse = inputs(t, s, b=1, h=1, dq=64, dv=64, dtype=jnp.bfloat16)
    results = []
    for backend in ("mosaic_gpu", "reference"):
        run = functools.partial(attend, backend=backend, **options)
        found = pulled(run, (q, k, v), d_out, d_lse)
        results.append([np.asarray(x, np.float32) for x in found])
    assert_attends(*results, 2e-2)
    assert rising == ([True, True] if options or t != s else [])


def rotary(operands, r):
    """q, k, v as q, k without its last columns, v and what stood there at the first head."""
    q, k, v = operands
    return q, k[..., :-r], v, k[:, :, 0, -r:]


@pytest.mark.parametrize(
    ("card", "dq", "dv", "takes"),
    [(9.0, 192, 128, True), (8.9, 192, 128, False), (8.0, 96, 64, True), (7.5, 96, 64, False),
     (9.0, 64, 128, False), (9.0, 60, 60, False), (0.0, 96, 64, False)],
)  # fmt: skip
def test_cudnn_is_chosen_where_the_card_takes_the_width(monkeypatch, card, dq, dv, takes):
    monkeypatch.setattr(device, "compute_capability", lambda: card)
    q, _, v, *_ = inputs(8, dq=dq, dv=dv, dtype=jnp.bfloat16)
    assert mla_attention_cudnn.takes(q, v) is takes
    assert not mla_attention_cudnn.takes(q.astype(jnp.float32), v)


def test_cudnn_attends_where_it_is_chosen_and_lse_is_exact(monkeypatch):
    """With XLA's attention in cuDNN's place."""
    monkeypatch.setattr(device, "compute_capability", lambda: 8.0)
    chosen, right = [], jax.nn.dot_product_attention

    def product(*operands, implementation, **how):
        chosen.append(implementation)
        return right(*operands, **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", product)
    *operands, d_out, d_lse = inputs(40, dtype=jnp.bfloat16)
    operands = rotary(operands, 8)
    results = []
    for backend in ("auto", "reference"):

        def run(q, k, v, rope, backend=backend):
            return attend(q, k, v, k_rope=rope, backend=backend)

        found = pulled(run, operands, d_out, d_lse)
        results.append([np.asarray(x, np.float32) for x in found])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert_attends(*results, 3e-2)
    assert chosen == ["cudnn"]
    q, k, v, rope = operands
    attend(q[:, 1:], k, v, k_rope=rope)
    attend(q, k, v, k_rope=rope, causal=False)
    attend(q, k, v, k_rope=rope, segment_ids=ids_of([40], 2))
    attend(*(x.astype(jnp.float32) for x in (q, k, v)), k_rope=rope.astype(jnp.float32))
    assert chosen == ["cudnn"]


def test_lse_that_is_not_used_costs_cudnn_nothing(monkeypatch):
    """XLA drops the reference, its backward pass too."""
    monkeypatch.setattr(mla_attention_cudnn, "takes", lambda q, v: True)
    monkeypatch.setattr(mla_attention_cudnn, "attend_causally", lambda q, *_, scale: q[..., :16])
    monkeypatch.setattr(door, "takes_kernels", lambda backend: False)
    q, k, v, *_ = inputs(8)

    def loss(x):
        layers = jax.lax.scan(
            lambda c, _: (jnp.sin(attend(q + c, k, v)[0].sum()), None), x, None, 3
        )
        return layers[0]

    text = jax.jit(jax.value_and_grad(loss)).lower(1.0).compile().as_text()
    assert "dot(" not in text
    assert "exponential" not in text


@pytest.mark.gpu
@pytest.mark.parametrize(("t", "dq", "dv"), [(300, 48, 32), (1024, 96, 64), (64, 256, 128)])
def test_cudnn(t, dq, dv, monkeypatch):
    monkeypatch.setattr(device, "compute_capability", card)
    *operands, d_out, _ = inputs(t, dq=dq, dv=dv, dtype=jnp.bfloat16)
    assert mla_attention_cudnn.takes(operands[0], operands[2])
    operands, results = rotary(operands, 16), []
    for backend in ("auto", "reference"):

        def run(q, k, v, rope, backend=backend):
            return attend(q, k, v, k_rope=rope, backend=backend)[0]

        out, pull = jax.vjp(run, *operands)
        results.append([np.asarray(x, np.float32) for x in (out, *pull(d_out))])
    assert_attends(*results, 5e-2)


SHAPES = (2, 8, 3, 24), (2, 8, 3, 24), (2, 8, 3, 16)
IDS = jnp.zeros((2, 8), jnp.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=(2, 8, 3, 23)), r"k is float32 \(2, 8, 3, 23\): expected float32 \(2, 8, 3, 24\)"),
        (dict(k=(2, 8, 4, 24)), r"k is float32 \(2, 8, 4, 24\): expected float32 \(2, 8, 3, 24\)"),
        (dict(v=(2, 9, 3, 16)), r"v is float32 \(2, 9, 3, 16\): expected float32 \(2, 8, 3, 16\)"),
        (dict(q=(8, 3, 24)), r"q is float32 \(8, 3, 24\): expected .* \[b, t, h, dq\]"),
        (dict(k_rope=(2, 8, 8)), r"expected float32 \(2, 8, 3, 16\)"),
        (dict(k=(2, 8, 3, 16), k_rope=(2, 7, 8)), r"k_rope is .* expected float32 \(2, 8, 8\)"),
        (dict(v=None), r"k is \(2, 8, 3, 24\) without v: expected dq - r = 24 columns of keys"),
        (dict(scale=-1.0), "scale is -1.0: expected a positive number"),
        (dict(scale=float("nan")), "scale is nan: expected a positive number"),
        (dict(backend="flash"), "backend is 'flash'"),
        (dict(segment_ids=IDS[:, :7]), r"segment_ids is int32 \(2, 7\): expected int32 \(2, 8\)"),
        (dict(segment_ids=IDS.astype(jnp.float32)), "segment_ids is float32"),
        (dict(segment_ids=IDS.at[1, 3].set(1)), r"segment_ids\[1\] has id 0 in several places"),
        (dict(q=(2, 7, 3, 24), segment_ids=IDS[:, :7]), "7 queries and 8 keys: expected as many"),
        (dict(segment_ids=IDS, cu_seqlens=IDS[0]), "both given"),
        (dict(cu_seqlens=jnp.array([0, 8])), r"q is .*: expected .* \[t, h, dq\]"),
    ],
)
def test_refuses(changes, message):
    changes = dict(zip(("q", "k", "v"), SHAPES, strict=True)) | dict(scale=SCALE) | changes
    operands = {key: jnp.ones(x) if isinstance(x, tuple) else x for key, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        mla_attention(**operands)


@pytest.mark.parametrize("bounds", [[0, 7], [1, 8], [0, 5, 3, 8], [0, 9, 8], [0]])
def test_refuses_bounds(bounds):
    q, k, v = (jnp.ones(x[1:]) for x in SHAPES)
    with pytest.raises(ValueError, match="cu_seqlens is "):
        attend(q, k, v, cu_seqlens=jnp.array(bounds, jnp.int32))


def test_refuses_what_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(door, "takes_kernels", lambda backend: True)
    q, k, v, *_ = inputs(8)
    with pytest.raises(ValueError, match=r"float32 of widths \(24, 16\) and 8 keys: its kernels"):
        attend(q, k, v, backend="mosaic_gpu")
    assert_attends(attend(q, k, v), plain(q, k, v, causal(8)))


def test_refuses_mixed_dtypes():
    q, k, v, *_ = inputs(8)
    with pytest.raises(ValueError, match=r"k is bfloat16 .* expected float32"):
        attend(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match="q is int32"):
        attend(*(x.astype(jnp.int32) for x in (q, k, v)))


def test_scale_must_be_known():
    q, k, v, *_ = inputs(8)
    with pytest.raises(ValueError, match="known when tracing"):
        jax.jit(lambda scale: mla_attention(q, k, v, scale=scale))(0.3)


def test_weights_are_not_kept():
    """What the backward pass needs is as long as the operands: no queries x keys."""
    q, k, v, *_ = inputs(1500, b=1, h=2, dq=8, dv=8)
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], q, k, v))
    assert max(x.size for x in kept) <= q.size
    grad = jax.make_jaxpr(jax.grad(lambda *x: attend(*x)[0].sum()))(q, k, v)
    sizes = [var.aval.size for eqn in every(grad.jaxpr) for var in eqn.outvars]
    assert max(sizes) <= 2 * mla_attention_reference.BLOCK * 1500


def every(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from every(inner)
