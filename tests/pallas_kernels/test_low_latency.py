"""The jnp side of the low-latency exchange on CPU devices against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels.low_latency import (
    combine_receive,
    combine_send,
    dispatch_receive,
    dispatch_send,
    open_inbox,
)
from pallas_kernels.quantize import quantize_tiles
from tests.pallas_kernels.test_expert_exchange import AXIS, KINDS, cpus, on_mesh, summed
from tests.pallas_kernels.test_permute import BF16, assert_same_bits, draw


def routed(kind, ranks, tokens, k, local, seed=0):
    """Choices [R, T, k], -1 for none."""
    rng, shape = np.random.default_rng([seed, ranks, tokens, k]), (ranks, tokens, k)
    if kind == "random":  # of some tokens all choices are dropped
        chosen = np.argsort(rng.random((ranks, tokens, max(k, ranks * local))))[..., :k]
        dropped = rng.random(shape) < 0.15
        dropped[:, ::4] |= rng.random((ranks, len(range(0, tokens, 4)), 1)) < 0.5
        chosen = np.where(dropped | (chosen >= ranks * local), -1, chosen)
    elif kind == "all to one":
        chosen = rng.integers(0, local, shape) + local * (ranks - 1)
    elif kind == "empty ranks":
        chosen = rng.integers(0, local, shape) + local * (ranks // 2)
        chosen[0] = -1
    else:  # "duplicates": all experts of a token on one rank, many of them the same
        chosen = rng.integers(0, ranks, (ranks, tokens, 1)) * local
        chosen = chosen + rng.integers(0, min(2, local), shape)
    return chosen.astype(np.int32)


def placed(chosen, local):
    """Slots [R, R * T, k] and counts [R, E], counted token by token."""
    ranks, flat = len(chosen), chosen.reshape(-1, chosen.shape[2])
    slots = np.full((ranks, *flat.shape), -1, np.int32)
    counts = np.zeros((ranks, local), np.int32)
    for token, experts in enumerate(flat):
        for expert in set(experts[experts >= 0]):
            rank, place = divmod(expert, local)
            slots[rank, token, experts == expert] = place * len(flat) + counts[rank, place]
            counts[rank, place] += 1
    return slots, counts


def powers(shape, seed=1):
    """Weights whose products are exact."""
    return 2.0 ** np.random.default_rng(seed).integers(-3, 3, shape).astype(np.float32)


def drawn(kind, ranks, tokens, k, width, local, seed=0):
    """x, choices and weights of all ranks, and y, NaN in rows that are nobody's."""
    chosen = routed(kind, ranks, tokens, k, local, seed)
    x = draw((ranks, tokens, width), BF16, seed)
    x[0, 0, 3] = np.nan
    y = np.full((ranks, local, ranks * tokens, width), np.nan, BF16)
    _, counts = placed(chosen, local)
    for place in np.ndindex(*counts.shape):
        y[place][: counts[place]] = draw((counts[place], width), BF16, seed + 1)
    return x, chosen, powers(chosen.shape, seed), y


def assert_received(got, x, chosen, weights, power_of_two=False):
    """Of all ranks, row by row."""
    q, scale, counts, slots, by, _ = jax.tree.map(np.asarray, got)
    (ranks, tokens, k), (local, width) = chosen.shape, (counts.shape[1], x.shape[-1])
    wanted, sizes = placed(chosen, local)
    np.testing.assert_array_equal(slots, wanted)
    np.testing.assert_array_equal(counts, sizes)
    assert_same_bits(by, np.broadcast_to(weights.reshape(-1, k), by.shape))
    cast = quantize_tiles(jnp.asarray(x).reshape(-1, width), power_of_two=power_of_two,
                          backend="reference")  # fmt: skip
    rank, token, j = np.nonzero(slots >= 0)
    slot = slots[rank, token, j]
    for part, whole in zip((q, scale), map(np.asarray, cast), strict=True):
        assert part.shape == (ranks, local, ranks * tokens, whole.shape[1])
        assert_same_bits(part.reshape(ranks, -1, whole.shape[1])[rank, slot], whole[token])


def sums(y, chosen, weights):
    """[R, T, d] that come home."""
    ranks, tokens, k = chosen.shape
    slots, _ = placed(chosen, y.shape[1])
    rows = np.stack([own.reshape(-1, y.shape[-1])[at] for own, at in zip(y, slots, strict=True)])
    by = weights.reshape(1, -1, k, 1).astype(np.float32)
    parts = summed((rows.astype(np.float32) * by), slots >= 0).astype(BF16)
    parts = parts.reshape(ranks, ranks, tokens, -1).transpose(1, 2, 0, 3)
    there = (slots >= 0).any(2).reshape(ranks, ranks, tokens).transpose(1, 2, 0)
    return summed(parts, there)


def one_round(inbox, x, chosen, weights, y, **options):
    got = dispatch_receive(inbox, dispatch_send(inbox, x, chosen, weights, **options))
    return got, combine_receive(inbox, combine_send(inbox, y, got))


def opened(x, chosen, y, **options):
    return open_inbox(*x.shape, chosen.shape[-1], y.shape[0], **options)


def alone(x, chosen, weights, y, axis, power_of_two=False, **options):
    inbox = opened(x, chosen, y, axis=axis, **options)
    return one_round(inbox, x, chosen, weights, y, power_of_two=power_of_two)


def rounds(x, chosen, weights, y, axis, **options):
    """Of arrays with a further axis first, all through one inbox: what came home in each."""
    inbox = opened(x[0], chosen[0], y[0], axis=axis, **options)

    def again(i, out):
        _, home = one_round(inbox, x[i], chosen[i], weights[i], y[i])
        return out.at[i].set(home)

    return lax.fori_loop(0, len(x), again, jnp.zeros_like(x))


def interleaved(x, chosen, weights, y, axis, **options):
    """Two micro-batches, each on an inbox of its own."""
    inboxes = [opened(x[0], chosen[0], y[0], axis=axis, **options) for _ in range(2)]

    def again(i, _):
        sent = [
            dispatch_send(inbox, x[j], chosen[j], weights[j]) for j, inbox in enumerate(inboxes)
        ]
        got = [dispatch_receive(*both) for both in zip(inboxes, sent, strict=True)]
        back = [combine_send(inbox, y[j], got[j]) for j, inbox in enumerate(inboxes)]
        return jnp.stack([combine_receive(*both) for both in zip(inboxes, back, strict=True)])

    return lax.fori_loop(0, 2, again, jnp.zeros_like(x))


def of_rounds(kinds, *sizes):
    """Operands of rounds [R, n, ...], and what comes home."""
    each = [drawn(kind, *sizes, seed) for seed, kind in enumerate(kinds)]
    operands = [np.stack(parts, axis=1) for parts in zip(*each, strict=True)]
    return operands, np.stack([sums(y, chosen, by) for _, chosen, by, y in each], axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "k"), [(1, 1), (2, 3), (4, 8)])
def test_round(ranks, k, kind):
    x, chosen, weights, y = drawn(kind, ranks, 5, k, 272, 3)
    got, out = on_mesh(alone, cpus(ranks), backend="reference")(x, chosen, weights, y)
    assert_received(got, x, chosen, weights)
    assert_same_bits(out, sums(y, chosen, weights))
    wanted = chosen[..., None] // 3 == np.arange(ranks)
    np.testing.assert_array_equal(got.ranks, wanted.any(2))


def test_scales_that_are_powers_of_two():
    x, chosen, weights, y = drawn("random", 2, 5, 3, 256, 3)
    got, _ = on_mesh(alone, cpus(2), power_of_two=True)(x, chosen, weights, y)
    assert_received(got, x, chosen, weights, power_of_two=True)


def test_rounds_through_one_inbox():
    operands, home = of_rounds([*KINDS, "random"], 2, 5, 3, 128, 2)
    assert_same_bits(on_mesh(rounds, cpus(2), backend="reference")(*operands), home)


def test_two_inboxes():
    operands, home = of_rounds(["random", "duplicates"], 4, 3, 2, 128, 2)
    assert_same_bits(on_mesh(interleaved, cpus(4), backend="reference")(*operands), home)


def test_groups_of_a_mesh():
    mesh = cpus(2, 2, names=("data", AXIS))
    groups = [drawn("random", 2, 5, 3, 128, 2, seed) for seed in range(2)]
    operands = [np.concatenate(parts) for parts in zip(*groups, strict=True)]
    _, out = on_mesh(alone, mesh)(*operands)
    for i, (_, chosen, weights, y) in enumerate(groups):
        assert_same_bits(out[2 * i : 2 * i + 2], sums(y, chosen, weights))


def wrong(match, axis=AXIS, sizes=(5, 128, 3, 2), **changes):
    x, chosen, weights, y = drawn("random", 2, 5, 3, 128, 2)
    given = dict(x=x, chosen=chosen, weights=weights, y=y) | changes
    options = {name: given.pop(name) for name in ("ctas", "chunk", "backend") if name in given}

    def run(x, chosen, weights, y, axis):
        return one_round(open_inbox(*sizes, axis=axis, **options), x, chosen, weights, y)

    with pytest.raises(ValueError, match=match):
        on_mesh(run, cpus(2), axis=axis)(*given.values())


def test_wrong_operands():
    x, chosen, weights, y = drawn("random", 2, 5, 3, 128, 2)
    wrong(r"x is bfloat16 \(5, 64\): expected bfloat16 \(5, 128\)", x=x[..., :64])
    wrong("x is float32", x=x.astype(np.float32))
    wrong(r"experts_TK is int32 \(4, 3\): expected int32 \(5, 3\)", chosen=chosen[:, :4])
    wrong("weights_TK is bfloat16", weights=weights.astype(BF16))
    wrong(r"y is bfloat16 \(2, 9, 128\): expected bfloat16 \(2, 10, 128\)", y=y[:, :, :9])
    wrong("experts is 0: expected 1 or more", sizes=(5, 128, 3, 0))
    wrong("chunk is 0", chunk=0)
    wrong("ctas is -1", ctas=-1)
    wrong("axis is 'model': expected one that jax.shard_map maps", axis="model")
    wrong("backend is 'cuda'", backend="cuda")


def test_not_differentiable():
    x, chosen, weights, y = drawn("random", 2, 5, 3, 128, 2)
    run = functools.partial(on_mesh(alone, cpus(2), backend="reference"))
    with pytest.raises(TypeError, match="not differentiable here"):
        jax.grad(lambda y: run(x, chosen, weights, y)[1].astype(jnp.float32).sum())(y)
