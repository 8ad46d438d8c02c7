"""The jnp side of expert exchange on CPU devices against numpy, for routings of every kind."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from pallas_kernels.expert_exchange import (
    combine_ranks,
    dispatch_quantized,
    dispatch_rows,
    reduce_rows,
)
from tests.pallas_kernels.test_permute import BF16, DTYPES, E4M3, assert_same_bits, draw

AXIS, LOCAL = "expert", 4  # the latter: experts a rank


class Routing(NamedTuple):
    """What ranks know of all tokens, a row each; `rows` of capacity, of which some stay unnamed."""

    slots: np.ndarray
    tokens: np.ndarray
    count: np.ndarray
    ranks: np.ndarray
    rows: int

    @property
    def layout(self):
        return self.slots, self.tokens, self.count


def laid_out(chosen, seed=0, align=2):
    """Rows in the order of experts, aligned, for choices [R, T, k], -1 for none."""
    (ranks, tokens, k), rng = chosen.shape, np.random.default_rng(seed)
    flat = chosen.reshape(ranks * tokens, k)
    slots = np.full((ranks, *flat.shape), -1, np.int32)
    used = 0
    for rank in range(ranks):
        row = 0
        for expert in range(rank * LOCAL, (rank + 1) * LOCAL):
            places = np.argwhere(flat == expert)
            slots[rank, places[:, 0], places[:, 1]] = row + np.arange(len(places))
            row += -(-len(places) // align) * align
        used = max(used, row)
    here = (slots >= 0).any(2)
    listed = rng.integers(-(2**31), 2**31, here.shape).astype(np.int32)  # behind count: anything
    for rank, own in enumerate(here):
        listed[rank, : own.sum()] = np.flatnonzero(own)
    count = here.sum(1, dtype=np.int32)[:, None]
    by_rank = here.reshape(ranks, ranks, tokens).transpose(1, 2, 0)
    return Routing(slots, listed, count, by_rank, used + 3)


def route(kind, ranks, tokens, k, seed=0):
    rng, shape = np.random.default_rng([seed, ranks, tokens, k]), (ranks, tokens, k)
    experts = ranks * LOCAL
    if kind == "random":  # some choices are dropped, of some tokens all
        chosen = np.argsort(rng.random((ranks, tokens, experts)))[..., :k]
        dropped = rng.random(shape) < 0.1
        dropped[:, ::4] |= rng.random((ranks, len(range(0, tokens, 4)), 1)) < 0.5
        chosen = np.where(dropped, -1, chosen)
    elif kind == "all to one":
        chosen = rng.integers(0, LOCAL, shape)
    elif kind == "empty ranks":
        chosen = rng.integers(0, LOCAL, shape) + LOCAL * (ranks // 2)
        chosen[0] = -1
    else:  # "duplicates": of a token on one rank, of some of them on one expert
        chosen = rng.integers(0, ranks, (ranks, tokens, 1)) * LOCAL + rng.integers(0, 2, shape)
    return laid_out(chosen, seed)


KINDS = ["random", "all to one", "empty ranks", "duplicates"]


def cpus(*sizes, names=(AXIS,)):
    devices = np.array(jax.devices("cpu")[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def on_mesh(function, mesh, *, axis=AXIS, **options):
    """Of arrays that hold a rank's part in each row, to results of that kind."""
    spec = PartitionSpec(mesh.axis_names)

    def of_rank(*operands):
        own = jax.tree.map(lambda x: x[0], operands)
        found = function(*own, **({} if axis is None else dict(axis=axis)), **options)
        return jax.tree.map(lambda x: x[None], found)

    return jax.jit(
        jax.shard_map(of_rank, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


def reference(function, ranks, **options):
    return on_mesh(function, cpus(ranks), backend="reference", **options)


def named(routing):
    """(rank, token, slot) of every row that is somebody's."""
    places = np.argwhere(routing.slots >= 0)
    return places[:, 0], places[:, 1], routing.slots[tuple(places.T)]


def assert_dispatched(found, x, routing):
    rank, token, slot = named(routing)
    assert found.shape == (len(x), routing.rows, x.shape[-1])
    expected = x.reshape(-1, x.shape[-1])[token]
    assert_same_bits(np.asarray(found)[rank, slot], expected)


def summed(parts, there):
    """In the order of the last axis but one of parts, in float32, rounded once."""
    total = np.zeros((*parts.shape[:-2], parts.shape[-1]), np.float32)
    for j in range(parts.shape[-2]):
        part = parts[..., j, :].astype(np.float32)
        total = total + np.where(there[..., j, None], part, np.float32(0))
    return total.astype(parts.dtype)


def rows_of(y, routing):
    """Rows of all choices [R, R * T, k, d]."""
    return np.stack([own[slots] for own, slots in zip(y, routing.slots, strict=True)])


def poisoned(shape, routing, dtype, seed=0):
    """y, NaN where no slot points to."""
    y, (rank, _, slot) = draw(shape, dtype, seed), named(routing)
    used = np.zeros(y.shape[:2], bool)
    used[rank, slot] = True
    y[~used] = np.nan
    return y


def partials(routing, width, dtype, seed=0):
    """Sums of the ranks, NaN where a rank has none."""
    partial = draw((*routing.slots.shape[:2], width), dtype, seed)
    partial[(routing.slots < 0).all(2)] = np.nan
    return partial


def combined(partial, routing):
    ranks, tokens, _ = routing.ranks.shape
    parts = partial.reshape(ranks, ranks, tokens, -1).transpose(1, 2, 0, 3)
    return summed(parts, routing.ranks)


on_routings = pytest.mark.parametrize("kind", KINDS)
of_ranks = pytest.mark.parametrize("ranks", [2, 4, 8])


@on_routings
@of_ranks
def test_dispatch(ranks, kind):
    routing = route(kind, ranks, 5, 3)
    for dtype in DTYPES if ranks == 4 else [BF16]:
        x = draw((ranks, 5, 24), dtype)
        x[:, 1] = np.nan
        found = reference(dispatch_rows, ranks, rows=routing.rows)(x, *routing.layout)
        assert_dispatched(found, x, routing)


@on_routings
def test_dispatch_quantized(kind):
    routing = route(kind, 4, 6, 3)
    q, scale = draw((4, 6, 272), E4M3), draw((4, 6, 3))
    run = reference(dispatch_quantized, 4, rows=routing.rows)
    found, found_scale = run(q, scale, *routing.layout)
    assert_dispatched(found, q, routing)
    assert_dispatched(found_scale, scale, routing)


@on_routings
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_reduce(dtype, kind):
    routing = route(kind, 4, 6, 5)
    y = poisoned((4, routing.rows, 16), routing, dtype)
    run = reference(reduce_rows, 4, axis=None)
    listed = (routing.slots >= 0).any(2)
    found = run(y, routing.slots, None, routing.tokens, routing.count)
    expected = summed(rows_of(y, routing), routing.slots >= 0)
    assert_same_bits(np.asarray(found)[listed], expected[listed])
    weights = 2.0 ** np.random.default_rng(1).integers(-3, 3, routing.slots.shape)  # exact
    found = run(y, routing.slots, weights.astype(np.float32), routing.tokens, routing.count)
    parts = rows_of(y, routing) * weights[..., None].astype(dtype)
    assert_same_bits(np.asarray(found)[listed], summed(parts, routing.slots >= 0)[listed])


@on_routings
@of_ranks
def test_combine(ranks, kind):
    routing = route(kind, ranks, 5, 3)
    for dtype, of_dtype in [(BF16, bool), (np.float32, np.int32)][: 2 if ranks == 4 else 1]:
        partial = partials(routing, 16, dtype)
        found = reference(combine_ranks, ranks)(partial, routing.ranks.astype(of_dtype))
        assert_same_bits(found, combined(partial, routing))


def test_combine_rounds_once():
    """In bfloat16 256 + 1 is 256."""
    partial = np.array([[256], [1], [1], [0]], BF16).reshape(4, 1, 1).repeat(4, 1)
    found = reference(combine_ranks, 4)(partial, np.ones((4, 1, 4), bool))
    assert (np.asarray(found, np.float32) == 258).all()


@pytest.mark.parametrize("axis", ["expert", ("data", "expert"), ("expert",)])
def test_meshes_of_several_axes(axis):
    """Groups of four side by side, and the eight of both axes as one."""
    mesh, ranks = cpus(2, 1, 4, names=("data", "fsdp", "expert")), 4 if len(axis) != 2 else 8
    groups = [route("random", ranks, 5, 3, seed) for seed in range(8 // ranks)]
    rows = max(group.rows for group in groups)
    groups = [group._replace(rows=rows) for group in groups]
    x = draw((8, 5, 24))
    layout = [np.concatenate(parts) for parts in zip(*(g.layout for g in groups), strict=True)]
    run = functools.partial(on_mesh, mesh=mesh, axis=axis, backend="reference")
    found = run(dispatch_rows, rows=rows)(x, *layout)
    partial = np.concatenate([partials(group, 16, BF16) for group in groups])
    back = run(combine_ranks)(partial, np.concatenate([group.ranks for group in groups]))
    for i, group in enumerate(groups):
        own = slice(i * ranks, (i + 1) * ranks)
        assert_dispatched(found[own], x[own], group)
        assert_same_bits(back[own], combined(partial[own], group))


def test_there_and_back():
    """Weights of 1 / 4, a power of two: the sum of a token's copies is the token."""
    ranks, tokens = 4, 6
    chosen = np.argsort(np.random.default_rng(0).random((ranks, tokens, ranks * LOCAL)))[..., :4]
    routing, x = laid_out(chosen), draw((ranks, tokens, 16), BF16)

    def exchange(x, slots, tokens, count, of, axis):
        y = dispatch_rows(x, slots, tokens, count, rows=routing.rows, axis=axis)
        weights = jnp.full(slots.shape, 0.25, jnp.float32)
        return combine_ranks(reduce_rows(y, slots, weights, tokens, count), of, axis=axis)

    assert_same_bits(on_mesh(exchange, cpus(ranks))(x, *routing.layout, routing.ranks), x)


def test_slots_outside_are_left_out():
    routing, x = route("random", 2, 5, 3), draw((2, 5, 16))
    few = routing.rows // 2
    found = reference(dispatch_rows, 2, rows=few)(x, *routing.layout)
    fewer = routing._replace(slots=np.where(routing.slots < few, routing.slots, -1), rows=few)
    assert_dispatched(found, x, fewer)


def test_empty_rank_gives_zeros():
    """Tokens of which no rank has a row."""
    routing = route("empty ranks", 4, 5, 3)
    found = reference(combine_ranks, 4)(partials(routing, 16, BF16), routing.ranks)
    assert not np.asarray(found[0], np.float32).any()


def wrong(function, *changes, match, ranks=2, axis=AXIS, **options):
    routing = route("random", ranks, 5, 3)
    given = dict(
        x=draw((ranks, 5, 16), BF16), q=draw((ranks, 5, 16), E4M3), scale=draw((ranks, 5, 1)),
        y=draw((ranks, routing.rows, 16), BF16), slots=routing.slots, weights=None,
        tokens=routing.tokens, count=routing.count, ranks=routing.ranks,
        partial=draw((ranks, 5 * ranks, 16), BF16),
    ) | dict(changes)  # fmt: skip
    names = {
        dispatch_rows: "x slots tokens count", reduce_rows: "y slots weights tokens count",
        dispatch_quantized: "q scale slots tokens count", combine_ranks: "partial ranks",
    }[function].split()  # fmt: skip
    if function in (dispatch_rows, dispatch_quantized):
        options = dict(rows=routing.rows) | options
    operands = [given[name] for name in names]
    with pytest.raises(ValueError, match=match):
        on_mesh(function, cpus(ranks), axis=None if function is reduce_rows else axis, **options)(
            *operands
        )


def test_wrong_operands():
    x, slots = draw((2, 5, 16), np.float16), route("random", 2, 5, 3).slots
    bad = functools.partial(wrong, dispatch_rows)
    bad(("x", x), match=r"x is float16 \(5, 16\): expected float8_e4m3fn or bfloat16 or float32")
    bad(("slots", slots[:, :9]), ("tokens", slots[:, :9, 0]), match=r"slots is \(9, 3\).* T = 10")
    bad(("slots", slots[..., :0]), match=r"slots is \(10, 0\): expected k of 1 or more")
    bad(("slots", slots.astype(np.int16)), match="slots is int16")
    bad(("tokens", slots), match=r"tokens is int32 \(10, 3\): expected int32 \(10,\)")
    bad(("count", slots[:, 0, :2]), match=r"count is int32 \(2,\): expected int32 \(1,\)")
    bad(rows=0, match="rows is 0: expected 1 or more")
    bad(ctas=0, match="ctas is 0: expected 1 or more")
    bad(axis="model", match="axis is 'model': expected one that jax.shard_map maps")
    bad(backend="cuda", match="backend is 'cuda'")
    wrong(dispatch_quantized, ("scale", draw((2, 5, 2))), match=r"q_scale is float32 \(5, 2\)")


def test_wrong_sums():
    routing = route("random", 2, 5, 3)
    bad = functools.partial(wrong, reduce_rows)
    bad(("y", draw((2, 9, 16), E4M3)), match="y is float8_e4m3fn")
    bad(("weights", draw((2, 10, 2))), match=r"weights is float32 \(10, 2\): .* \(10, 3\)")
    bad = functools.partial(wrong, combine_ranks)
    bad(("ranks", routing.ranks[..., :1]), match=r"ranks is \(5, 1\): expected R = 2 as on")
    bad(("ranks", routing.ranks.astype(np.float32)), match="ranks is float32")
    bad(("partial", draw((2, 9, 16), BF16)), match=r"partial is bfloat16 \(9, 16\): .* \(10, 16\)")


def test_kernels_refuse_what_does_not_fit():
    odd, wide = draw((2, 5, 7), BF16), draw((2, 5, 1 << 17), E4M3)
    bad = functools.partial(wrong, backend="mosaic_gpu")
    bad(dispatch_rows, ("x", odd), match="a row of 7 bfloat16 has 14 bytes")
    bad(dispatch_rows, ("x", wide), match="has 131072 bytes")
    bad(reduce_rows, match="bfloat16, d 16 and k 3: mosaic_gpu takes bfloat16, multiples of 128")
    bad(combine_ranks, match="bfloat16, d 16 and R 2")


def test_not_differentiable():
    routing, x = route("random", 2, 5, 3), draw((2, 5, 16))
    run = reference(dispatch_rows, 2, rows=routing.rows)
    with pytest.raises(TypeError, match="not differentiable here"):
        jax.grad(lambda x: run(x, *routing.layout).sum())(x)
