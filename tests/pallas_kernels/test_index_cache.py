"""The paged cache of the indexer's keys: its bytes, and what is written where."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.index_cache import (
    PAGE_BYTES,
    append_index_keys,
    join_pages,
    split_pages,
)
from pallas_kernels.lightning_indexer import quantize_index

E4M3 = ml_dtypes.float8_e4m3fn
PAGES = 7


def keys(shape, seed=0):
    rng = np.random.default_rng(seed)
    return quantize_index(jnp.asarray(rng.normal(size=(*shape, 128)), jnp.float32))


def garbage(seed=1):
    return np.random.default_rng(seed).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)


def test_bytes_of_a_page():
    values, scales = keys((2, 64))
    page = np.asarray(join_pages(values, scales))
    assert page.shape == (2, PAGE_BYTES)
    np.testing.assert_array_equal(page[1, :8192].view(E4M3).reshape(64, 128), values[1])
    np.testing.assert_array_equal(page[1, 8192:].view("<f4"), scales[1])
    again = split_pages(jnp.asarray(page))
    np.testing.assert_array_equal(again[0], values)
    np.testing.assert_array_equal(again[1], scales)


def there():
    return jnp.asarray(garbage())


@pytest.mark.parametrize("jit", [False, True])
def test_append(jit):
    """Tokens lie where the table says, padding and misplaced ones nowhere, the rest stays."""
    k, scale = keys((3, 4))
    table = np.full((3, 2), 2147480000, np.int32)
    table[0], table[1, 1], table[2, 0] = (3, 5), 0, 6
    positions = np.array([[62, 63, 64, 65], [-1, 127, 64, -1], [0, 1, 128, 500]], np.int32)
    append = jax.jit(append_index_keys) if jit else append_index_keys
    found = np.asarray(append(there(), k, scale, jnp.asarray(table), jnp.asarray(positions)))
    expected = garbage()
    places = {(0, 0): (3, 62), (0, 1): (3, 63), (0, 2): (5, 0), (0, 3): (5, 1)}
    places |= {(1, 1): (0, 63), (1, 2): (0, 0), (2, 0): (6, 0), (2, 1): (6, 1)}
    for token, (page, row) in places.items():
        expected[page, row * 128 :][:128] = np.asarray(k)[token].view(np.uint8)
        expected[page, 8192 + 4 * row :][:4] = np.asarray(scale)[token][None].view(np.uint8)
    np.testing.assert_array_equal(found, expected)


def test_a_page_that_is_not_there():
    k, scale = keys((1, 1))
    for page in (-1, PAGES, 2147480000):
        table, position = jnp.array([[page]], jnp.int32), jnp.array([[3]], jnp.int32)
        found = append_index_keys(there(), k, scale, table, position)
        np.testing.assert_array_equal(found, garbage())


def test_nothing_to_append():
    none = jnp.zeros((2, 0), jnp.int32)
    k, scale = jnp.zeros((2, 0, 128), E4M3), jnp.zeros((2, 0))
    found = append_index_keys(there(), k, scale, none, none)
    np.testing.assert_array_equal(found, garbage())


def test_refusals():
    k, scale = keys((2, 3))
    table, positions = jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"cache is uint8 \(7, 8447\): expected uint8 \(7, 8448\)"):
        append_index_keys(there()[:, 1:], k, scale, table, positions)
    with pytest.raises(ValueError, match=r"k_scale is float32 \(2, 1\): expected float32 \(2, 3\)"):
        append_index_keys(there(), k, scale[:, :1], table, positions)
    with pytest.raises(ValueError, match=r"positions is int32 \(2, 2\)"):
        append_index_keys(there(), k, scale, table, positions[:, :2])
    with pytest.raises(ValueError, match=r"block_table is int32 \(1, 1\)"):
        append_index_keys(there(), k, scale, table[:1], positions)
    with pytest.raises(ValueError, match=r"scales is float32 \(2, 3, 1\): expected .*\(2, 64\)"):
        join_pages(jnp.zeros((2, 64, 128), E4M3), jnp.zeros((2, 3, 1)))
    with pytest.raises(
        ValueError, match=r"cache is uint8 \(64, 132\): expected uint8 \(64, 8448\)"
    ):
        split_pages(jnp.zeros((64, 132), jnp.uint8))
