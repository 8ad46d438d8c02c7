"""Sums pushed to their tokens: interpreted and lowered on CPUs, on one card, between cards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_expert_combine
from pallas_kernels.expert_exchange import combine_ranks, reduce_rows
from pallas_kernels.sm90_expert_combine import Ring
from pallas_kernels.sm90_expert_push import CTAS, SENDERS, SMS, combine_push
from pallas_kernels.sm90_peers import OneCard, Peers
from tests.pallas_kernels.test_expert_exchange import (
    AXIS,
    KINDS,
    LOCAL,
    cpus,
    laid_out,
    on_mesh,
    poisoned,
    reference,
    route,
)
from tests.pallas_kernels.test_permute import BF16, assert_same_bits, draw
from tests.pallas_kernels.test_sm90_expert_exchange import fresh, gpus

SMALL = Ring(bytes=4096, stages=SENDERS + 2)


NCCL = 32  # CTAs at most


def push_all(y, slots, weights, tokens, count, ranks, **options):
    """With the arguments of both kernels that it stands for."""
    return combine_push(y, slots, weights, ranks, **options)


def powers(shape):
    """Weights whose products are exact."""
    return 2.0 ** np.random.default_rng(1).integers(-3, 3, shape).astype(np.float32)


def given(routing, width, weighted, seed=0):
    """Operands of all ranks, NaN in rows that nobody names."""
    y = poisoned((len(routing.slots), routing.rows, width), routing, BF16, seed)
    weights = powers(routing.slots.shape) if weighted else None
    return y, routing.slots, weights, routing.tokens, routing.count, routing.ranks


def referred(y, slots, weights, tokens, count, ranks):
    sums = reference(reduce_rows, len(y), axis=None)(y, slots, weights, tokens, count)
    return reference(combine_ranks, len(y))(sums, ranks)


def interpreted(capsys, operands, **options):
    """The two parts of the kernel; fails on a race."""
    options = dict(ring=SMALL, ctas=2) | options
    options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
    found = push_all(*operands, peers=OneCard(len(operands[0])), **options)
    jax.block_until_ready(found)
    assert "RACE" not in "".join(capsys.readouterr())
    return found


def test_all_ctas_run_beside_nccl():
    assert CTAS + NCCL <= SMS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_push(kind, weighted, capsys):
    operands = given(route(kind, 2, 5, 3), 256, weighted)
    assert_same_bits(interpreted(capsys, operands, chunk=2), referred(*operands))


@pytest.mark.parametrize(
    ("ranks", "tokens", "chunk", "ctas"),
    [(3, 4, 1, 5), (2, 5, 8, 3), (4, 3, 2, 1), (1, 4, 3, 1), (2, 8, 4, 3)],
)
def test_chunks(ranks, tokens, chunk, ctas, capsys):
    """Of one token, of all, and of fewer than there are ranks."""
    operands = given(route("random", ranks, tokens, 3), 128, False)
    found = interpreted(capsys, operands, chunk=chunk, ctas=ctas)
    assert_same_bits(found, referred(*operands))


@pytest.mark.parametrize(("stages", "columns"), [(1, 384), (SENDERS + 5, 128)])
def test_pieces(stages, columns, capsys, monkeypatch):
    monkeypatch.setattr(sm90_expert_combine, "MOST_COLUMNS", columns)
    operands = given(route("duplicates", 2, 3, 2), 384, False)
    found = interpreted(capsys, operands, chunk=2, ring=Ring(stages=stages))
    assert_same_bits(found, referred(*operands))


def test_slots_outside_are_left_out(capsys):
    """Of tokens that are listed: their sum, of no rows, comes all the same."""
    routing = route("random", 2, 5, 3)
    few = routing.rows // 3
    operands = given(routing, 128, False)
    operands = np.where(np.isnan(operands[0]), 0, operands[0])[:, :few], *operands[1:]
    assert_same_bits(interpreted(capsys, operands, chunk=2), referred(*operands))


def test_empty_rank(capsys):
    """No rank has a row for the tokens of rank 0."""
    operands = given(route("empty ranks", 2, 5, 3), 128, False)
    found = interpreted(capsys, operands, chunk=4)
    assert not np.asarray(found[0], np.float32).any()


def shapes(devices, ranks, tokens, width, k=3, rows=99):
    of, total = jax.ShapeDtypeStruct, ranks * tokens
    return [
        of((devices, rows, width), BF16), of((devices, total, k), jnp.int32),
        of((devices, total, k), jnp.float32), of((devices, total), jnp.int32),
        of((devices, 1), jnp.int32), of((devices, tokens, ranks), jnp.bool),
    ]  # fmt: skip


def pushed(*operands, axis, **options):
    return push_all(*operands, peers=Peers.along(axis), **options)


MESHES = [
    ((4,), (AXIS,), AXIS, 4),
    ((2, 1, 2), ("data", "fsdp", AXIS), AXIS, 2),
    ((2, 1, 2), ("data", "fsdp", AXIS), ("data", AXIS), 4),
]


@pytest.mark.parametrize(("sizes", "names", "axis", "ranks"), MESHES)
def test_lowers_for_cuda(sizes, names, axis, ranks):
    """One kernel, which reaches the devices of the whole mesh."""
    run = on_mesh(pushed, cpus(*sizes, names=names), axis=axis)
    lowered = run.trace(*shapes(4, ranks, 65, 7168)).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @mosaic_gpu") == 1
    assert lowered.count('xla_replica_ids = "0,1,2,3"') == 1


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_lowers_for_one_card(ranks):
    """One kernel as well, without a word about other devices."""
    run = jax.jit(functools.partial(push_all, peers=OneCard(ranks)))
    operands = shapes(ranks, ranks, 33, 7168)
    lowered = run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @mosaic_gpu") == 1
    assert "uses_xla_collective_metadata = true" not in lowered


@pytest.mark.parametrize("ctas", [0, SMS // 4 + 1])
def test_ctas_that_would_not_run_at_once(ctas):
    run = functools.partial(push_all, peers=OneCard(4), ctas=ctas)
    with pytest.raises(ValueError, match=f"ctas is {ctas}: expected 1 to {SMS // 4}"):
        jax.eval_shape(run, *shapes(4, 4, 5, 128))


def one_card(y, slots, weights, tokens, count, ranks):
    """`reduce_rows` and `combine` of ranks behind one another."""
    sums = [
        sm90_expert_combine.reduce_rows(y[r], slots[r], weights[r], tokens[r], count[r])
        for r in range(len(y))
    ]
    return sm90_expert_combine.combine(jnp.stack(sums), ranks, peers=OneCard(len(y)))


def between_cards(*operands, axis):
    *rows, ranks = operands
    sums = sm90_expert_combine.reduce_rows(*rows)
    return sm90_expert_combine.combine(sums, ranks, peers=Peers.along(axis))


def routed(ranks, tokens, k, seed):
    chosen = np.random.default_rng(seed).random((ranks, tokens, ranks * LOCAL))
    return laid_out(np.argsort(chosen)[..., :k])


def differing(push, pull, y, *rest, rounds):
    """Rounds of ever other rows, by powers of two: elements unlike those of the first round.

    That one is compared with `pull`, elements of which come first.
    """
    found = push(y, *rest)
    first = (found != pull(y, *rest)).sum()

    def once(i, wrong):
        scale = (2.0 ** (i % 5 - 2)).astype(y.dtype)
        return wrong + (push(y * scale, *rest) != found * scale).sum()

    return jnp.stack([first, jax.lax.fori_loop(0, rounds, once, jnp.int32(0))])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ranks", "tokens", "k", "width", "chunk"),
    [(1, 3, 1, 128, 8), (2, 5, 3, 384, 2), (4, 517, 8, 7168, 16), (8, 301, 6, 2048, 8)],
)
def test_card(kind, ranks, tokens, k, width, chunk):
    seed = fresh()
    routing = route(kind, ranks, tokens, k, seed)
    y, slots, _, *rest = given(routing, width, False, seed)
    operands = [jnp.asarray(x) for x in (y, slots, draw(slots.shape, seed=seed), *rest)]
    push = jax.jit(functools.partial(push_all, peers=OneCard(ranks), chunk=chunk))
    wanted = one_card(*operands)
    for _ in range(2):
        assert_same_bits(push(*operands), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(("ctas", "chunk"), [(32, 4), (32, 16), (7, 8)])
def test_card_under_load(ctas, chunk):
    """A row that is stale or torn, of this round or the one before, shows."""
    ranks, tokens, width, seed = 4, 515, 7168, fresh()
    routing = routed(ranks, tokens, 6, seed)
    y, slots, _, *rest = given(routing, width, False, seed)
    y, weights = np.where(np.isnan(y), 0, y), draw(slots.shape, seed=seed)
    push = functools.partial(push_all, peers=OneCard(ranks), ctas=ctas, chunk=chunk)
    run = jax.jit(functools.partial(differing, push, one_card, rounds=200))
    assert not np.asarray(run(y, slots, weights, *rest)).any()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "k", "width"), [(5, 3, 384), (517, 8, 7168)])
def test_cards(tokens, k, width, kind):
    ranks, seed = min(8, jax.device_count()), fresh()
    routing = route(kind, ranks, tokens, k, seed)
    operands = given(routing, width, True, seed)
    wanted = on_mesh(between_cards, gpus(ranks))(*operands)
    assert_same_bits(on_mesh(pushed, gpus(ranks))(*operands), wanted)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("ctas", "chunk"), [(128, 8), (128, 16), (64, 16), (24, 4)])
def test_cards_under_load(ctas, chunk):
    ranks, tokens, width, seed = min(8, jax.device_count()), 1030, 7168, fresh()
    routing = routed(ranks, tokens, 6, seed)
    y, slots, _, *rest = given(routing, width, False, seed)
    y, weights = np.where(np.isnan(y), 0, y), draw(slots.shape, seed=seed)

    def rounds(*operands, axis):
        push = functools.partial(pushed, axis=axis, ctas=ctas, chunk=chunk)
        pull = functools.partial(between_cards, axis=axis)
        return differing(push, pull, *operands, rounds=200)

    wrong = on_mesh(rounds, gpus(ranks))(y, slots, weights, *rest)
    assert not np.asarray(wrong).any()
