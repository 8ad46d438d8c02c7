"""The plan of paged decode: every step of every request once, in even parts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sm90_mla_plan import OVERHEAD, STEP, TOLERATED, plan

SIZES = [(1, 132), (1, 1), (2, 66), (6, 16), (7, 4), (9, 132), (33, 33), (64, 66), (66, 33),
         (131, 132), (200, 132), (200, 3)]  # fmt: skip


@functools.cache
def planner(parts):
    return jax.jit(jax.vmap(functools.partial(plan, parts=parts)))


def lengths_of(b, seed=0):
    """Equal and ragged, few and many, around the ends of steps, zeros, one among zeros: [n, b]."""
    rng = np.random.default_rng([seed, b])
    rows = [np.full(b, length) for length in (0, 1, 128, 129, 4096, 131072)]
    rows += [rng.integers(0, most + 1, b) for most in (1, 300, 3000, 9000, 131072) for _ in "four"]
    rows += [np.maximum(rng.normal(4096, 2048, b), 0), rng.exponential(2000, b)]
    rows += [rng.integers(0, 40, b) * STEP + rng.integers(-1, 2, b).clip(0) for _ in "four"]
    rows += [np.where(rng.random(b) < 0.7, 0, rng.integers(0, 9000, b)) for _ in "four"]
    rows += [np.where(np.arange(b) == rng.integers(b), 50000, few) for few in (0, 100)]
    return np.array(rows, np.int32)


def pieces_of(starts, steps):
    """(request, first step, step behind the last, part) by a walk as the kernel does it."""
    for part, ((request, step, _), (end, last, _)) in enumerate(itertools.pairwise(starts)):
        for own in range(request, end + (last > 0)):
            first = step if own == request else 0
            yield own, first, last if own == end else steps[own], part


def assert_plans(lengths, starts, splits, count):
    parts = len(starts) - 1
    steps = np.maximum(-(-lengths // STEP), 1)
    assert starts[0, :2].tolist() == [0, 0]
    assert starts[-1, :2].tolist() == [len(lengths), 0]
    assert (starts[:, 2] == lengths[np.minimum(starts[:, 0], len(lengths) - 1)]).all()
    found = [[] for _ in lengths]
    load = np.zeros(parts)
    slots = set()
    for request, first, end, part in pieces_of(starts.tolist(), steps.tolist()):
        assert first < end
        found[request].append((first, end, part))
        load[part] += end - first + OVERHEAD
        if (first, end) != (0, steps[request]):
            slot = 2 * part + (first == 0)
            assert slot not in slots
            slots.add(slot)
    wanted = []
    for request, pieces in enumerate(found):
        assert pieces[0][0] == 0
        assert pieces[-1][1] == steps[request]
        for (_, end, part), (first, _, then) in itertools.pairwise(pieces):
            assert (first, then) == (end, part + 1)
        if len(pieces) > 1:
            wanted.append([request, pieces[0][2], pieces[-1][2]])
    assert splits[: count[0]].tolist() == wanted
    share = -(-int((steps + OVERHEAD).sum()) // parts)
    assert load.max() <= TOLERATED * (share + OVERHEAD)


@pytest.mark.parametrize(("b", "parts"), SIZES)
def test_every_step_once_and_evenly(b, parts):
    lengths = lengths_of(b)
    found = planner(parts)(lengths)
    assert all(array.dtype == jnp.int32 for array in found)
    for row, *own in zip(lengths, *map(np.asarray, found), strict=True):
        assert_plans(row, *own)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_sizes(seed):
    rng = np.random.default_rng(seed)
    b, parts = int(rng.integers(1, 201)), int(rng.integers(1, 133))
    lengths = lengths_of(b, seed)
    found = planner(parts)(lengths)
    for row, *own in zip(lengths, *map(np.asarray, found), strict=True):
        assert_plans(row, *own)


@pytest.mark.parametrize(("b", "parts"), [(132, 132), (66, 33), (1, 1), (64, 66)])
def test_equal_requests_that_fill_the_parts_stay_whole(b, parts):
    lengths = np.array([[length] * b for length in (0, 700, 4096, 131072)], np.int32)
    found = planner(parts)(lengths)
    assert not np.asarray(found.count).any()


def test_a_long_request_is_shared_by_all_parts():
    found = plan(jnp.array([(132 * 16 - OVERHEAD) * STEP], jnp.int32), 132)
    assert found.parts == 132
    assert found.count.tolist() == [1]
    assert found.splits[0].tolist() == [0, 0, 131]


def test_lengths_near_the_end_of_int32():
    lengths = np.array([[2**31 - 129, 2**31 - 200, 5]], np.int32)
    found = planner(66)(lengths)
    assert_plans(lengths[0].astype(np.int64), *(np.asarray(array)[0] for array in found))
