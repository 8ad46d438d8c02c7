"""The Hopper kernels of expert exchange: interpreted on one device, lowered for four, on cards."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh

from pallas_kernels import device, sm90_expert_combine, sm90_expert_dispatch
from pallas_kernels.expert_exchange import (
    combine_ranks,
    dispatch_quantized,
    dispatch_rows,
    reduce_rows,
)
from pallas_kernels.permute import ROW_MOST
from pallas_kernels.sm90_peers import OneCard, Peers
from tests.pallas_kernels.test_expert_exchange import (
    AXIS,
    KINDS,
    LOCAL,
    assert_dispatched,
    combined,
    cpus,
    laid_out,
    named,
    on_mesh,
    partials,
    poisoned,
    reference,
    route,
)
from tests.pallas_kernels.test_permute import BF16, E4M3, assert_near_sum, assert_same_bits, draw

SMALL = sm90_expert_dispatch.Ring(bytes=4096, stages=3)
FEW = sm90_expert_combine.Ring(bytes=2048, stages=3)


@pytest.fixture
def interpreted(capsys):
    """Runs a kernel and fails on a race."""

    def run(kernel, *operands, **options):
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        found = jax.jit(functools.partial(kernel, interpret=interpret, **options))(*operands)
        jax.block_until_ready(found)
        assert "RACE" not in "".join(capsys.readouterr())
        return found

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch(kind, interpreted):
    routing, x = route(kind, 2, 5, 3), draw((2, 5, 24), BF16)
    x[:, 2] = np.nan
    options = dict(rows=routing.rows, peers=OneCard(2), ctas=2, ring=SMALL)
    found = interpreted(sm90_expert_dispatch.dispatch, x, *routing.layout, **options)
    assert_dispatched(found, x, routing)
    wanted = reference(dispatch_rows, 2, rows=routing.rows)(x, *routing.layout)
    rank, _, slot = named(routing)
    assert_same_bits(np.asarray(found)[rank, slot], np.asarray(wanted)[rank, slot])


@pytest.mark.parametrize(
    ("stages", "ctas", "dtype"), [(2, 1, E4M3), (5, 3, np.float32), (12, 99, E4M3)]
)
def test_rings(stages, ctas, dtype, interpreted):
    routing, x = route("random", 2, 4, 2), draw((2, 4, 16), dtype)
    ring = sm90_expert_dispatch.Ring(stages=stages)
    options = dict(rows=routing.rows, peers=OneCard(2), ctas=ctas, ring=ring)
    found = interpreted(sm90_expert_dispatch.dispatch, x, *routing.layout, **options)
    assert_dispatched(found, x, routing)


@pytest.mark.parametrize("row", [16, 2048, 7168, 14336, 40000, ROW_MOST])
def test_rings_fit_in_shared_memory(row):
    ring = sm90_expert_dispatch.RING
    walkers, stages = ring.fitting(row)
    assert walkers * stages * row <= ring.bytes
    assert 1 <= walkers <= ring.walkers
    assert stages >= 2
    assert walkers * stages <= sm90_expert_dispatch.MOST_BARRIERS


def test_slots_outside_are_left_out(interpreted):
    """Tokens without any row among them: an empty group of stores would end a wait too early."""
    routing, x = route("random", 2, 5, 3), draw((2, 5, 16))
    few = routing.rows // 3
    options = dict(rows=few, peers=OneCard(2), ctas=1, ring=SMALL)
    found = interpreted(sm90_expert_dispatch.dispatch, x, *routing.layout, **options)
    kept = np.where(routing.slots < few, routing.slots, -1)
    assert_dispatched(found, x, routing._replace(slots=kept, rows=few))


@pytest.mark.parametrize("width", [144, 528])
def test_dispatch_quantized(width, interpreted):
    routing, q = route("duplicates", 2, 5, 3), draw((2, 5, width), E4M3)
    scale = draw((2, 5, -(-width // 128)))
    options = dict(rows=routing.rows, peers=OneCard(2), ctas=2, ring=SMALL)
    run = sm90_expert_dispatch.dispatch_quantized
    found, found_scale = interpreted(run, q, scale, *routing.layout, **options)
    assert_dispatched(found, q, routing)
    assert_dispatched(found_scale, scale, routing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_reduce(weighted, kind, interpreted):
    routing = route(kind, 2, 3, 3)
    y = poisoned((2, routing.rows, 256), routing, BF16)
    powers = np.random.default_rng(1).integers(-3, 3, routing.slots.shape)  # products are exact
    weights = 2.0 ** powers.astype(np.float32) if weighted else None
    wanted = reference(reduce_rows, 2, axis=None)(y, routing.slots, weights, *routing.layout[1:])
    rank = int(kind == "empty ranks")
    slots, listed, count = (x[rank] for x in routing.layout)
    operands = y[rank], slots, weights[rank] if weighted else None, listed, count
    found = interpreted(sm90_expert_combine.reduce_rows, *operands, ctas=2, ring=FEW)
    here = (slots >= 0).any(1)
    assert_same_bits(np.asarray(found)[here], np.asarray(wanted)[rank, here])


@pytest.mark.parametrize("kind", KINDS)
def test_combine(kind, interpreted):
    routing = route(kind, 2, 5, 3)
    partial, options = partials(routing, 256, BF16), dict(peers=OneCard(2), ctas=2, ring=FEW)
    found = interpreted(sm90_expert_combine.combine, partial, routing.ranks, **options)
    assert_same_bits(found, combined(partial, routing))
    assert_same_bits(found, reference(combine_ranks, 2)(partial, routing.ranks))


@pytest.mark.parametrize(("stages", "columns"), [(1, 384), (5, 128)])
def test_sums_by_pieces(stages, columns, interpreted, monkeypatch):
    """More pieces of tokens than CTAs, and one stage only."""
    monkeypatch.setattr(sm90_expert_combine, "MOST_COLUMNS", columns)
    routing, ring = route("random", 3, 2, 2), sm90_expert_combine.Ring(stages=stages)
    partial, options = partials(routing, 384, BF16), dict(peers=OneCard(3), ctas=2, ring=ring)
    found = interpreted(sm90_expert_combine.combine, partial, routing.ranks, **options)
    assert_same_bits(found, combined(partial, routing))


def test_columns():
    """As many as fit the registers, whole vectors, none left over."""
    widths = [128, 384, 1536, 2048, 7168, 16384, 12416]
    wanted = [(128, 1), (384, 1), (1536, 4), (2048, 8), (7168, 8), (8192, 8), (128, 1)]
    assert [sm90_expert_combine.columns_of(width) for width in widths] == wanted


def exchange(x, q, scale, slots, weights, tokens, count, ranks, axis):
    """All that a rank calls, but for `reduce_rows`, whose kernel asks for the GPU's size."""
    layout, options = (slots, tokens, count), dict(axis=axis, backend="mosaic_gpu")
    y = dispatch_rows(x, *layout, rows=512, **options)
    sums = sm90_expert_combine.reduce_rows(y, slots, weights, tokens, count, ctas=264)
    back = combine_ranks(sums, ranks, ctas=16, **options)
    moved = dispatch_quantized(q, scale, *layout, rows=512, ctas=16, **options)
    return back, moved


MESHES = [
    ((4,), (AXIS,), AXIS),
    ((1, 1, 4), ("data", "fsdp", AXIS), AXIS),
    ((2, 1, 2), ("data", "fsdp", AXIS), AXIS),
    pytest.param((2, 2), (AXIS, "data"), AXIS, marks=pytest.mark.slow),
    pytest.param((2, 1, 2), ("data", "fsdp", AXIS), ("data", AXIS), marks=pytest.mark.slow),
]


def lowered(mesh, axis, tokens, width, k=3):
    devices, of = mesh.size, jax.ShapeDtypeStruct
    ranks = devices if axis == ("data", AXIS) else mesh.shape[AXIS]
    x, total = (devices, tokens, width), ranks * tokens
    shapes = [
        of(x, BF16), of(x, E4M3), of((devices, tokens, -(-width // 128)), jnp.float32),
        of((devices, total, k), jnp.int32), of((devices, total, k), jnp.float32),
        of((devices, total), jnp.int32), of((devices, 1), jnp.int32),
        of((devices, tokens, ranks), jnp.bool),
    ]  # fmt: skip
    run = on_mesh(exchange, mesh, axis=axis)
    return run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def assert_unfused(text, kernels):
    """So many kernels, whose operands and results pass a barrier each: see `in_place`."""
    calls = re.findall(r"(%\w+)[:\w]* = stablehlo\.custom_call @mosaic_gpu_v2\((%\w+)", text)
    assert len(calls) == kernels
    barriers = re.findall(r"(%\w+)[:\w]* = stablehlo\.optimization_barrier ([^:]*)", text)
    for result, operand in calls:
        assert operand in {name for name, _ in barriers}
        assert any(
            result in given.replace("#", " ").replace(",", " ").split() for _, given in barriers
        )


@pytest.fixture
def hopper(monkeypatch):
    """As if there were such cards."""
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)


@pytest.mark.parametrize(("sizes", "names", "axis"), MESHES)
def test_lowers_for_cuda(sizes, names, axis, hopper):
    """Three kernels reach the devices of the whole mesh, one none."""
    text = lowered(cpus(*sizes, names=names), axis, 64, 7168)
    assert text.count('xla_replica_ids = "0,1,2,3"') == 3
    assert len(re.findall("uses_xla_collective_metadata = true", text)) == 3
    assert_unfused(text, 4)


def test_lowers_for_one_rank(hopper):
    """Without a word about other devices."""
    assert "uses_xla_collective_metadata = true" not in lowered(cpus(1), AXIS, 64, 1152)


def test_auto_takes_the_reference_where_peers_do_not_reach(hopper, monkeypatch):
    """In a program of several processes."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    routing, partial = route("random", 2, 5, 3), draw((2, 10, 128), BF16)
    found = on_mesh(combine_ranks, cpus(2))(partial, routing.ranks)
    assert_same_bits(found, combined(partial, routing))
    with pytest.raises(ValueError, match="this program has 2 processes"):
        on_mesh(combine_ranks, cpus(2), backend="mosaic_gpu")(partial, routing.ranks)


def test_mesh_that_peers_do_not_know():
    mesh = cpus(2, 2, names=("data", AXIS))
    in_part = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=None, out_specs=jax.P(AXIS), check_vma=False
    )
    with pytest.raises(ValueError, match=r"leaves \['data'\] of the mesh .* to XLA"):
        jax.eval_shape(
            in_part(lambda: jnp.zeros(Peers.along(AXIS).count), axis_names={AXIS}, in_specs=())
        )
    with pytest.raises(ValueError, match=r"axis is 'model': .* \('data', 'expert'\)"):
        jax.eval_shape(in_part(lambda: jnp.zeros(Peers.along("model").count), in_specs=()))
    with pytest.raises(ValueError, match=r"axis is 'expert': .* \(none\)"):
        Peers.along(AXIS)


def fresh():
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return seed


def twice(kernel, *operands, **options):
    """The kernel's result; unnamed rows of two runs may differ, which `rows` of it do not."""
    run = jax.jit(functools.partial(kernel, **options))
    return run(*operands), run(*operands)


# ranks, tokens, k, width
CARD_SHAPES = [(1, 3, 1, 128), (2, 5, 3, 384), (4, 517, 8, 7168), (8, 301, 6, 2048)]
on_card = pytest.mark.parametrize(("ranks", "tokens", "k", "width"), CARD_SHAPES)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("kind", KINDS)
def test_card_dispatch(kind, ranks, tokens, k, width):
    seed = fresh()
    routing = route(kind, ranks, tokens, k, seed)
    options = dict(rows=routing.rows, peers=OneCard(ranks))
    for dtype in (BF16, np.float32):
        x = draw((ranks, tokens, width), dtype, seed)
        for found in twice(sm90_expert_dispatch.dispatch, x, *routing.layout, **options):
            assert_dispatched(found, x, routing)
    q = draw((ranks, tokens, width), E4M3, seed)
    scale = draw((ranks, tokens, -(-width // 128)), seed=seed)
    operands = q, scale, *routing.layout
    for found in twice(sm90_expert_dispatch.dispatch_quantized, *operands, **options):
        assert_dispatched(found[0], q, routing)
        assert_dispatched(found[1], scale, routing)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 208, 4112, 16512])
def test_card_quantized_of_odd_widths(width):
    """Rows that are no multiple of 128, and more tiles than threads."""
    seed = fresh()
    routing, q = route("random", 4, 33, 5, seed), draw((4, 33, width), E4M3, seed)
    scale = draw((4, 33, -(-width // 128)), seed=seed)
    options = dict(rows=routing.rows, peers=OneCard(4))
    operands = q, scale, *routing.layout
    for found in twice(sm90_expert_dispatch.dispatch_quantized, *operands, **options):
        assert_dispatched(found[0], q, routing)
        assert_dispatched(found[1], scale, routing)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_card_reduce(weighted, kind, ranks, tokens, k, width):
    seed = fresh()
    routing = route(kind, ranks, tokens, k, seed)
    y = poisoned((ranks, routing.rows, width), routing, BF16, seed)[0]
    slots, listed, count = (x[0] for x in routing.layout)
    weights = draw(slots.shape, seed=seed) if weighted else None
    operands = y, slots, weights, listed, count
    found, again = twice(reduce_rows, *operands, backend="mosaic_gpu")
    here, there = (slots >= 0).any(1), (slots >= 0)[..., None]
    assert_same_bits(np.asarray(found)[here], np.asarray(again)[here])
    rows = np.where(there, y[slots], 0).reshape(-1, width).astype(BF16)  # zeros for what is not
    at = np.arange(slots.size).reshape(slots.shape)[here]
    if len(at):
        by = None if weights is None else weights[here]
        assert_near_sum(np.asarray(found)[here], rows, at, by)


@pytest.mark.gpu
@on_card
@pytest.mark.parametrize("kind", KINDS)
def test_card_combine(kind, ranks, tokens, k, width):
    seed = fresh()
    routing = route(kind, ranks, tokens, k, seed)
    partial, peers = partials(routing, width, BF16, seed), OneCard(ranks)
    for found in twice(sm90_expert_combine.combine, partial, routing.ranks, peers=peers):
        assert_same_bits(found, combined(partial, routing))


@pytest.mark.gpu
def test_card_rings_under_load():
    """Many runs of full rings: a stage that is filled before it has been stored shows here."""
    ranks, tokens, width, seed = 4, 2048, 4096, fresh()
    chosen = np.argsort(np.random.default_rng(seed).random((ranks, tokens, ranks * LOCAL)))
    routing, q = laid_out(chosen[..., :6]), draw((ranks, tokens, width), E4M3, seed)
    scale = draw((ranks, tokens, width // 128), seed=seed)
    rank, token, slot = (jnp.asarray(part) for part in named(routing))
    operands = [jnp.asarray(x) for x in (q, scale, *routing.layout)]

    @jax.jit
    def differing(q, scale, *layout):
        options = dict(rows=routing.rows, peers=OneCard(ranks))
        found = sm90_expert_dispatch.dispatch_quantized(q, scale, *layout, **options)
        bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint8)
        pairs = zip(found, (q.reshape(-1, width), scale.reshape(-1, width // 128)), strict=True)
        return [(bits(a[rank, slot]) != bits(b[token])).sum() for a, b in pairs]

    assert all(int(n) == 0 for _ in range(50) for n in differing(*operands))


def gpus(*sizes, names=(AXIS,)):
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


MOST = 8  # ranks, of those that there are
TRIPS = 20


def compared(mesh, ranks, tokens, k, width, kind, seed):
    """Named rows of the kernels between cards and of the references, bit for bit."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    groups = np.moveaxis(places, mesh.axis_names.index(AXIS), -1).reshape(-1, ranks)
    back_to = np.argsort(groups.reshape(-1))
    routing = route(kind, ranks, tokens, k, seed)
    known = (*routing.layout, routing.ranks)
    layout = [np.concatenate([part] * len(groups))[back_to] for part in known]
    x = draw((mesh.size, tokens, width), BF16, seed)
    q, scale = x.astype(E4M3), draw((mesh.size, tokens, -(-width // 128)), seed=seed)
    sums = [partials(routing, width, BF16, seed + i) for i in range(len(groups))]
    partial = np.concatenate(sums)[back_to]
    run = functools.partial(on_mesh, mesh=mesh, backend="mosaic_gpu")
    moved = run(dispatch_rows, rows=routing.rows)(x, *layout[:3])
    cast = run(dispatch_quantized, rows=routing.rows)(q, scale, *layout[:3])
    back = run(combine_ranks)(partial, layout[3])
    moved, cast, back = jax.tree.map(np.asarray, (moved, cast, back))
    for own in groups:
        assert_dispatched(moved[own], x[own], routing)
        assert_dispatched(cast[0][own], q[own], routing)
        assert_dispatched(cast[1][own], scale[own], routing)
        assert_same_bits(back[own], combined(partial[own], routing))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "k", "width"), [(5, 3, 384), (517, 8, 7168)])
def test_cards(tokens, k, width, kind):
    ranks = min(MOST, jax.device_count())
    compared(gpus(ranks), ranks, tokens, k, width, kind, fresh())


@pytest.mark.multi_gpu
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four GPUs")
@pytest.mark.parametrize("names", [("data", "fsdp", AXIS), (AXIS, "fsdp", "data")])
def test_cards_of_several_axes(names):
    compared(gpus(2, 1, 2, names=names), 2, 301, 6, 2048, "random", fresh())


@pytest.mark.multi_gpu
def test_cards_there_and_back():
    """Weights of 1 / 4: the sum of a token's copies is the token, of ever other tokens.

    A row that is stale, torn or from elsewhere shows.
    """
    ranks, tokens, width = min(MOST, jax.device_count()), 1024, 7168
    chosen = np.random.default_rng(seed := fresh()).random((ranks, tokens, ranks * LOCAL))
    routing = laid_out(np.argsort(chosen)[..., :4])
    x = draw((ranks, tokens, width), BF16, seed)

    def trips(x, slots, tokens, count, of, axis):
        options = dict(axis=axis, backend="mosaic_gpu")
        weights = jnp.full(slots.shape, 0.25, jnp.float32)

        def trip(i, differing):
            sent = x * (2.0 ** (i % 5)).astype(x.dtype)
            y = dispatch_rows(sent, slots, tokens, count, rows=routing.rows, **options)
            sums = reduce_rows(y, slots, weights, tokens, count, backend="mosaic_gpu")
            return differing + (combine_ranks(sums, of, **options) != sent).sum()

        return jax.lax.fori_loop(0, TRIPS, trip, 0)

    wrong = on_mesh(trips, gpus(ranks))(x, *routing.layout, routing.ranks)
    assert not np.asarray(wrong).any()
