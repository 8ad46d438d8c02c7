"""What decode reads in a benchmark: rotating block tables, ragged lengths, chosen tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.bench.ceilings import Device
from dsjax.bench.mla_decode import group_of, make_queries, sizes_of
from dsjax.bench.mla_shapes import select
from dsjax.bench.paged_cache import (
    block_tables,
    chosen_tokens,
    make_pool,
    pool_pages,
    ragged_lengths,
)

CARD = Device(8192, 1 << 30, 200_000_000, 4 << 30, 60, 20 * 10**12)


def test_tables_rotate_through_the_pool():
    lengths = np.array([1, 64, 0, 130], np.int32)
    tables = block_tables(lengths, 4, 12, 3)
    used = np.arange(4) < np.array([1, 1, 0, 3])[:, None]
    assert tables.shape == (3, 4, 4)
    assert not tables[:, ~used].any()
    pages = tables[:, used].ravel()
    assert sorted(pages[:12]) == list(range(12))  # none comes back before all were used
    assert list(pages[12:]) == list(pages[:3])
    assert list(pages[:12]) != list(range(12))


def test_pool_outgrows_the_cache_within_its_limit():
    page = 64 * 1152
    for kind, shape in select([], ["decode"]):
        used = shape.b * shape.t // 64
        size = pool_pages(used, page, 200_000_000) * page
        assert size >= max(200_000_000, 2 * used * page)
        assert size <= 10**10
        sizes = sizes_of([(kind, shape)], CARD)[group_of(kind, shape)]
        assert 2 <= sizes.calls <= 60
    assert pool_pages(10**6, page, 0) == 10**6


@pytest.mark.parametrize(("b", "mean"), [(128, 4096), (3, 100), (1, 7), (5, 1)])
def test_ragged_lengths_have_the_same_total(b, mean):
    lengths = ragged_lengths(b, mean)
    assert lengths.sum() == b * mean
    assert lengths.min() >= 1
    assert lengths.max() <= 2.5 * mean
    assert b < 100 or mean / 3 < lengths.std() < mean


def test_chosen_tokens_are_different_ones_of_their_request():
    table = jnp.array([[5, 2], [7, 1]], jnp.int32)
    chosen = np.array(chosen_tokens(jax.random.key(0), table, queries=3, count=100))
    assert chosen.shape == (2, 3, 100)
    assert len({tuple(query) for query in chosen.reshape(6, 100)}) == 6
    for tokens, pages in zip(chosen, table, strict=True):
        assert all(len(set(query)) == 100 for query in tokens)
        assert set(tokens.ravel() // 64) <= set(np.asarray(pages).tolist())


@pytest.mark.parametrize(("fp8", "width"), [(False, 576), (True, 656)])
def test_pool_has_the_pages_asked_for(fp8, width, monkeypatch):
    monkeypatch.setattr("dsjax.bench.paged_cache.ORIGINALS", 2)
    pool = make_pool(5, fp8=fp8)
    assert pool.shape == (6, 64, width)
    assert pool.dtype == (jnp.uint8 if fp8 else jnp.bfloat16)
    assert (pool[4] == pool[0]).all()
    assert not (pool[1] == pool[0]).all()


def test_queries_are_no_tokens_of_the_pool():
    tokens = np.asarray(make_pool(2, fp8=False), np.float32).reshape(-1, 576)
    queries = np.asarray(jnp.stack(make_queries(3, 2, 2, 8)), np.float32).reshape(-1, 576)
    known = np.concatenate([tokens, queries])
    cosines = np.abs(known @ known.T) / 576  # all are about as long
    assert (cosines - np.diag(np.diag(cosines))).max() < 0.5
