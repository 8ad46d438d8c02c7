"""The kernels that measure links move the rows that they say: interpreted, lowered, on cards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_link_ceilings import last_loaded, loads, stores
from pallas_kernels.sm90_peers import OneCard, Peers
from tests.pallas_kernels.test_expert_exchange import AXIS, cpus, on_mesh
from tests.pallas_kernels.test_permute import BF16, assert_same_bits, draw
from tests.pallas_kernels.test_sm90_expert_exchange import gpus


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


def assert_loaded(found, x, stages):
    """The last rows of a walk that is written out."""
    ranks, rows, _ = x.shape
    ctas = found.shape[1]
    for me in range(ranks):
        rank, row, there = last_loaded(rows, ctas, stages, ranks, me)
        for cta in range(ctas):
            walk = [
                ((me + 1 + (step + cta) % (ranks - 1)) % ranks, i)
                for i in range(cta, rows, ctas)
                for step in range(ranks - 1)
            ]
            last = {n % stages: item for n, item in enumerate(walk)}
            assert np.flatnonzero(there[cta]).tolist() == sorted(last)
            for stage, item in last.items():
                assert (int(rank[cta, stage]), int(row[cta, stage])) == item
                assert_same_bits(np.asarray(found)[me, cta, stage], x[item])


def assert_stored(found, x, rows):
    ranks, ctas, width = x.shape
    blocks = np.asarray(found).reshape(ranks, ranks, rows, width)
    for me in range(ranks):
        for other in set(range(ranks)) - {me}:
            assert_same_bits(blocks[me, other], x[other, np.arange(rows) % ctas])


@pytest.mark.parametrize(
    ("ranks", "rows", "ctas", "stages"), [(2, 7, 2, 3), (3, 5, 2, 2), (2, 3, 4, 2), (4, 3, 1, 4)]
)
def test_loads(ranks, rows, ctas, stages, interpreted):
    x = draw((ranks, rows, 128), BF16)
    found = interpreted(loads, x, ctas=ctas, stages=stages, peers=OneCard(ranks))
    assert_loaded(found, x, stages)


@pytest.mark.parametrize(("ranks", "rows", "ctas"), [(2, 7, 2), (3, 4, 3), (2, 1, 2)])
def test_stores(ranks, rows, ctas, interpreted):
    x = draw((ranks, ctas, 128), BF16)
    assert_stored(interpreted(stores, x, rows=rows, peers=OneCard(ranks)), x, rows)


@pytest.mark.parametrize("call", [lambda x: loads(x, ctas=2, peers=OneCard(1)),
                                  lambda x: stores(x, rows=2, peers=OneCard(1))])  # fmt: skip
def test_one_rank_has_no_links(call):
    with pytest.raises(ValueError, match="ranks are 1: a link is between two or more"):
        call(jnp.zeros((1, 2, 128), BF16))


def both(x, rows, ctas, axis):
    peers = Peers.along(axis)
    return loads(x, ctas=ctas, peers=peers), stores(x[:ctas], rows=rows, peers=peers)


@pytest.mark.parametrize("width", [3584, 7168])
def test_lowers_for_cuda(width):
    run = on_mesh(functools.partial(both, rows=64, ctas=32), cpus(4), axis=AXIS)
    shape = jax.ShapeDtypeStruct((4, 64, width), BF16)
    text = run.trace(shape).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('xla_replica_ids = "0,1,2,3"') == 2


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("rows", "ctas", "width"), [(5, 2, 128), (517, 32, 3584), (300, 128, 7168)]
)
def test_cards(rows, ctas, width):
    ranks = min(8, jax.device_count())
    x = draw((ranks, max(rows, ctas), width), BF16)
    run = on_mesh(functools.partial(both, rows=rows, ctas=ctas), gpus(ranks), axis=AXIS)
    loaded, stored = run(x)
    assert_loaded(loaded, x, loaded.shape[2])
    assert_stored(stored, x[:, :ctas], rows)
