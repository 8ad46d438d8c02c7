"""Paged MLA decode against numpy in float64, on tokens that lie among NaN, and what it refuses."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.latent_cache import dequantize_latent_cache, quantize_latent_cache
from pallas_kernels.mla_decode import mla_decode, plan_mla_decode

pytestmark = pytest.mark.usefixtures("auto_is_the_reference")
door = sys.modules[mla_decode.__module__]
SCALE = 0.1352
GARBAGE = 2147480000
quantized = jax.jit(functools.partial(quantize_latent_cache, backend="reference"))
LENGTHS = [300, 0, 1, 20, 64, 140]


def case(lengths, heads=3, queries=1, *, fp8=False, seed=0, size=0.1, spare=3):
    """q, cache, block_table, lengths. Pages lie in any order; what no request has is NaN, and
    entries of the table that no request needs are garbage."""
    rng = np.random.default_rng([seed, heads, queries, *lengths[:9]])
    b, most = len(lengths), max(-(-max(lengths) // 64), 1) + 1
    table = rng.permutation(b * most + spare)[: b * most].reshape(b, most).astype(np.int32)
    used = np.zeros((b * most + spare, 64), bool)
    for pages, length in zip(table, lengths, strict=True):
        count = -(-length // 64)
        used[pages[:count]] = np.arange(count * 64).reshape(count, 64) < length
        pages[count:] = GARBAGE
    assert not used.all()

    def draw(*shape):
        numbers = rng.standard_normal((*shape, 576), np.float32) * size
        return np.clip(numbers, -10 * size, 10 * size)

    cache = draw(*used.shape)
    cache[~used] = np.nan
    cache = jnp.asarray(cache.astype(jnp.bfloat16))
    if fp8:
        cache = jnp.where(used[..., None], quantized(cache), np.uint8(0xFF))
    q = jnp.asarray(draw(b, queries, heads).astype(jnp.bfloat16))
    return q, cache, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)


def truth(q, cache, table, lengths, causal=True, scale=SCALE):
    if cache.dtype == jnp.uint8:
        cache = jax.jit(dequantize_latent_cache)(cache)
    q, cache = (np.asarray(x, np.float64) for x in (q, cache))
    out, lse = np.zeros((*q.shape[:3], 512)), np.full(q.shape[:3], np.inf)
    for b, length in enumerate(np.asarray(lengths)):
        pages = np.asarray(table)[b, : -(-length // 64)]
        keys = cache[pages].reshape(-1, 576)[:length]
        for i in range(q.shape[1]):
            own = keys[: max(length - (q.shape[1] - 1 - i), 0) if causal else length]
            if len(own):
                scores = q[b, i] @ own.T * scale
                lse[b, i] = np.logaddexp.reduce(scores, axis=-1)
                out[b, i] = np.exp(scores - lse[b, i][:, None]) @ own[:, :512]
    return out, lse


def assert_near(found, expected, atol=1e-6):
    """Out is bfloat16, so right to half a unit in its last place; lse to float32."""
    out, lse = (np.asarray(x, np.float64) for x in found)
    np.testing.assert_allclose(out, expected[0], rtol=2**-8, atol=atol)
    np.testing.assert_allclose(lse, expected[1], rtol=2e-6, atol=1e-6)


@functools.partial(jax.jit, static_argnames=("causal",))
def decode(*operands, causal=True):
    return mla_decode(*operands, scale=SCALE, causal=causal)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("heads", "queries", "causal"),
    [(1, 1, True), (1, 4, False), (3, 2, True), (9, 4, True), (16, 2, False), (64, 4, True),
     (126, 2, True), (128, 1, False), (128, 4, True), (3, 70, True), (1, 150, True)],
)  # fmt: skip
def test_decode(heads, queries, causal, fp8):
    operands = case(LENGTHS, heads, queries, fp8=fp8)
    found = decode(*operands, causal=causal)
    assert found[0].shape == (len(LENGTHS), queries, heads, 512)
    assert found[0].dtype == jnp.bfloat16
    assert found[1].dtype == jnp.float32
    assert_near(found, truth(*operands, causal))


def test_large_scores():
    """Of hundreds: exp alone would overflow, and weights are right to 1e-5."""
    operands = case([200, 64], 4, 2, size=4)
    expected = truth(*operands)
    assert expected[1].max() > 100
    assert_near(decode(*operands), expected, atol=2e-4)


def test_one_query_sees_all_that_many_see_when_not_causal():
    q, *paged = case([200, 3], 4, 2)
    both = decode(q, *paged, causal=False)
    last = decode(q[:, 1:], *paged, causal=True)
    assert_near([x[:, 1:] for x in both], [np.asarray(x, np.float64) for x in last])


def test_outside_jit():
    operands = case(LENGTHS)
    assert_near(mla_decode(*operands, scale=SCALE), truth(*operands))


def test_a_request_does_not_depend_on_its_neighbours():
    """Nor do lengths that nobody could check."""
    q, cache, table, lengths = case([130, 70, 20])
    alone = decode(q[:1], cache, table[:1], lengths[:1])
    wrong = decode(q, cache, table, lengths.at[1:].set(jnp.array([-5, 2**30], jnp.int32)))
    assert_near([x[0] for x in wrong], [np.asarray(x[0], np.float64) for x in alone])
    assert np.isposinf(wrong[1][1]).all()
    assert not np.asarray(wrong[0][1], np.float32).any()


@pytest.mark.parametrize("empty", ["b", "pages", "table"])
def test_empty(empty):
    q, cache, table, lengths = case([0, 0])
    if empty == "b":
        q, table, lengths = q[:0], table[:0], lengths[:0]
    elif empty == "pages":
        cache = cache[:0]
    else:
        table = table[:, :0]
    plan = plan_mla_decode(lengths, queries=1, heads=3)
    out, lse = mla_decode(q, cache, table, lengths, scale=1.0, plan=plan)
    assert out.shape == (*q.shape[:3], 512)
    assert not np.asarray(out, np.float32).any()
    assert np.isposinf(lse).all()


@pytest.mark.parametrize(
    ("queries", "heads", "parts"), [(1, 1, 132), (1, 128, 66), (2, 128, 33), (3, 64, 44),
                                    (1, 65, 66), (4, 126, 16), (133, 64, 1)],
)  # fmt: skip
def test_parts_of_a_plan(queries, heads, parts, monkeypatch):
    """And the call that it is for takes it."""
    monkeypatch.setattr(door, "_sms", lambda: 132)
    of = jax.ShapeDtypeStruct
    lengths = of((5,), jnp.int32)
    make = functools.partial(plan_mla_decode, queries=queries, heads=heads)
    plan = jax.eval_shape(make, lengths)
    assert plan.parts == parts
    q, cache = (of((*shape, 576), jnp.bfloat16) for shape in ((5, queries, heads), (9, 64)))
    take = functools.partial(mla_decode, scale=1.0)
    out, lse = jax.eval_shape(take, q, cache, of((5, 7), jnp.int32), lengths, plan=plan)
    assert out.shape == (*lse.shape, 512) == (5, queries, heads, 512)


def test_plan_inside_jit_serves_several_layers():
    operands = case(LENGTHS, 4, 2)

    @jax.jit
    def step(q, cache, table, lengths):
        plan = plan_mla_decode(lengths, queries=2, heads=4, max_length=300, debug=True)
        attend = functools.partial(mla_decode, scale=SCALE, plan=plan)
        first, _ = attend(q, cache, table, lengths)
        rotary = jnp.zeros((*first.shape[:-1], 64), first.dtype)
        return attend(jnp.concatenate([first, rotary], axis=-1), cache, table, lengths)

    paged = operands[1:]
    first = jnp.asarray(decode(*operands)[0])
    second = jnp.pad(first, ((0, 0), (0, 0), (0, 0), (0, 64)))
    assert_near(step(*operands), truth(second, *paged))


def test_debug_checks_lengths_that_are_traced():
    made = jax.jit(
        functools.partial(plan_mla_decode, queries=1, heads=3, max_length=300, debug=True)
    )
    run_through(made, [300, 0])
    for wrong in (301, -1):
        with pytest.raises(Exception, match=rf"ValueError: lengths\[1\] is {wrong}: .*0 to 300"):
            run_through(made, [0, wrong])


def run_through(made, lengths):
    jax.block_until_ready(made(jnp.array(lengths, jnp.int32)))
    jax.effects_barrier()


def test_lengths_are_not_checked_while_traced_without_debug():
    made = jax.jit(functools.partial(plan_mla_decode, queries=1, heads=3, max_length=300))
    run_through(made, [0, 301])


@pytest.mark.parametrize("which", [0, 1])
def test_no_gradients(which):
    def total(*floats):
        return mla_decode(*floats, *case([9, 3])[2:], scale=1.0)[0].astype(jnp.float32).sum()

    with pytest.raises(TypeError, match="mla_decode is not differentiable: use mla_attention"):
        jax.grad(total, which)(*case([9, 3])[:2])


def changed(**changes):
    """A call that is right but for the changes: other values, or functions of the right ones."""
    names = "q", "cache", "block_table", "lengths"
    operands = dict(zip(names, case([9, 100]), strict=True), scale=1.0)
    for name, change in changes.items():
        operands[name] = change(operands[name]) if callable(change) else change
    return mla_decode(**operands)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[:, 0], r"q is bfloat16 \(2, 3, 576\): expected .*\[b, s, h, 576\]"),
        ("q", lambda x: x.astype(jnp.float32), "q is float32 .*expected bfloat16"),
        ("q", lambda x: x[..., :512], r"\(2, 1, 3, 512\): expected .*\(2, 1, 3, 576\)"),
        ("q", lambda x: x[:, :0], r"q is \(2, 0, 3, 576\): expected one query"),
        ("q", lambda x: x[:, :, :0], r"q is \(2, 1, 0, 576\): expected one query"),
        ("q", lambda x: x[:1], r"block_table is int32 \(2, 3\): expected int32 \(1, 3\)"),
        ("cache", lambda x: x[0], r"cache is bfloat16 \(64, 576\): expected .*\[pages, 64"),
        ("cache", lambda x: x[:, :32], r"\(9, 32, 576\): expected .*\(9, 64, 576\)"),
        ("cache", lambda x: x[..., :512], r"\(9, 64, 512\): expected .*\(9, 64, 576\)"),
        ("cache", lambda x: x.astype(jnp.float16), "expected bfloat16 or uint8"),
        ("cache", lambda x: x.astype(jnp.uint8), r"expected uint8 \(9, 64, 656\)"),
        ("block_table", lambda x: x[0], r"block_table is int32 \(3,\): .*\[b, max_pages\]"),
        ("block_table", lambda x: x.astype(jnp.uint32), "block_table is uint32"),
        ("block_table", lambda x: x.at[0, 0].set(-1), r"block_table\[0, 0\] is -1, .*0 to 8"),
        ("lengths", lambda x: jnp.zeros(3, x.dtype), r"lengths is int32 \(3,\): .*\(2,\)"),
        ("lengths", lambda x: x.astype(jnp.float32), "lengths is float32"),
        ("lengths", lambda x: x.at[1].set(-1), r"lengths\[1\] is -1: expected 0 to 192"),
        ("lengths", lambda x: x.at[0].set(193), r"lengths\[0\] is 193: expected 0 to 192, 64 x"),
        (
            "lengths",
            lambda x: x.at[1].set(129),
            rf"block_table\[1, 2\] is {GARBAGE}, in use as lengths\[1\] is 129: expected 0 to 8",
        ),
        ("scale", 0.0, "scale is 0.0: expected a positive number"),
        ("scale", float("inf"), "scale is inf"),
        ("scale", float("nan"), "scale is nan"),
        ("scale", jnp.asarray, "scale is 1.0: expected .*known when tracing"),
        ("backend", "cuda", "backend is 'cuda'"),
        ("backend", "mosaic_gpu", "backend is 'mosaic_gpu': its kernels need a Hopper GPU"),
    ],
)
def test_refusals(name, change, message):
    with pytest.raises(ValueError, match=message):
        changed(**{name: change})


def planned(lengths=(9, 100), dtype=jnp.int32, **changes):
    return plan_mla_decode(jnp.asarray(lengths, dtype), **(dict(queries=1, heads=3) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lengths=[[9]]), r"lengths is int32 \(1, 1\): expected int32 \[b\]"),
        (dict(dtype=jnp.float32), "lengths is float32"),
        (dict(lengths=[9, -2]), r"lengths\[1\] is -2: expected 0 or more"),
        (dict(max_length=99), r"lengths\[1\] is 100: expected 0 to 99"),
        (dict(queries=0), "queries is 0: expected 1 or more"),
        (dict(heads=-1), "heads is -1: expected 1 or more"),
    ],
)
def test_refusals_of_the_planner(changes, message):
    with pytest.raises(ValueError, match=message):
        planned(**changes)


def test_plans_of_other_calls_are_refused(monkeypatch):
    monkeypatch.setattr(door, "_sms", lambda: 132)
    own = planned()
    assert changed(plan=own)[0].size
    plans = {
        "plan is of 66 parts: expected 132, .* 1 queries and 3 heads": planned(heads=65),
        "plan is of 1 requests: expected b = 2": planned([9]),
        r"plan.count is int32 \(3,\): expected int32 \(1,\)": own._replace(count=own.starts[0]),
    }
    for message, plan in plans.items():
        with pytest.raises(ValueError, match=message):
            changed(plan=plan)
