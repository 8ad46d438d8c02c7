"""Measured loads, those of GPUs under a plan, and their picture."""

import numpy as np
import pytest

from dsjax.parallel.balance import rebalance_experts
from dsjax.parallel.balance_picture import draw_balance
from dsjax.parallel.loads import LoadWindow, gpu_loads, imbalance

SIZE = 16  # where a PNG names its width and height


def test_a_window_sums_the_last_steps_and_forgets_older_ones():
    loads = np.random.default_rng(0).integers(0, 1000, (11, 3, 8))
    window = LoadWindow(layers=3, experts=8, steps=4)
    np.testing.assert_array_equal(window.total(), np.zeros((3, 8)))
    for n, load in enumerate(loads, start=1):
        window.add(load.astype(np.int32))
        np.testing.assert_array_equal(window.total(), loads[max(n - 4, 0) : n].sum(axis=0))


@pytest.mark.parametrize(("most", "dtype"), [(2**31 - 1, np.int32), (2**40, np.int64)])
def test_sums_of_a_window_do_not_overflow(most, dtype):
    window = LoadWindow(1, 2, 3)
    for _ in range(3):
        window.add(np.full((1, 2), most, dtype))
    np.testing.assert_array_equal(window.total(), np.full((1, 2), 3 * most))


def test_a_window_keeps_what_was_added_when_the_array_is_reused():
    window, load = LoadWindow(1, 2, 2), np.array([[1, 2]])
    window.add(load)
    load[:] = 9
    window.total()[:] = 7
    np.testing.assert_array_equal(window.total(), [[1, 2]])


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (np.zeros((3, 8), int), r"load_LE is \(3, 8\).*\(2, 8\)"),
        (np.zeros(8, int), r"load_LE is \(8,\)"),
        (np.zeros((2, 8)), "load_LE is float64"),
        (np.full((2, 8), -3), "least -3"),
    ],
)
def test_a_window_refuses_what_is_no_count_of_its_shape(load, message):
    window = LoadWindow(2, 8, 5)
    with pytest.raises(ValueError, match=message):
        window.add(load)
    np.testing.assert_array_equal(window.total(), np.zeros((2, 8)))


@pytest.mark.parametrize("sizes", [(0, 8, 5), (2, 0, 5), (2, 8, 0)])
def test_a_window_of_no_size_is_refused(sizes):
    with pytest.raises(ValueError, match="is 0: at least 1"):
        LoadWindow(*sizes)


def test_gpu_loads_are_those_of_a_loop_and_lose_nothing():
    weight = np.random.default_rng(1).pareto(1, (4, 16))
    plan = rebalance_experts(weight, 24, 4, 2, 6)
    found = gpu_loads(weight, plan.physical_to_logical, plan.logical_count, 6)
    wanted = np.zeros((4, 6))
    for layer in range(4):
        for place, expert in enumerate(plan.physical_to_logical[layer]):
            share = weight[layer, expert] / plan.logical_count[layer, expert]
            wanted[layer, place // 4] += share
    np.testing.assert_allclose(found, wanted)
    np.testing.assert_allclose(found.sum(axis=1), weight.sum(axis=1))


@pytest.mark.parametrize(
    ("weight", "order", "count", "gpus", "message"),
    [
        ((2, 4), (2, 6), (2, 5), 3, r"logical_count \(2, 5\)"),
        ((2, 4), (3, 6), (2, 4), 3, r"physical_to_logical \(3, 6\)"),
        ((4,), (6,), (4,), 3, r"weight_LE is \(4,\)"),
        ((2, 4), (2, 6), (2, 4), 4, "num_gpus is 4"),
        ((2, 4), (2, 6), (2, 4), 0, "num_gpus is 0"),
    ],
)
def test_gpu_loads_refuse_what_does_not_fit(weight, order, count, gpus, message):
    with pytest.raises(ValueError, match=message):
        gpu_loads(np.ones(weight), np.zeros(order, int), np.ones(count, int), gpus)


def test_imbalance_is_the_heaviest_load_in_means():
    np.testing.assert_allclose(imbalance([[1, 1, 4], [2, 2, 2], [0, 0, 0]]), [2, 1, 1])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        imbalance(np.ones(3))


@pytest.mark.parametrize("shape", [(1, 4), (58, 32), (3, 1)])
def test_the_picture_is_a_png_of_sensible_size(shape, tmp_path):
    rng = np.random.default_rng(shape[0])
    before, after = rng.pareto(1, shape), rng.uniform(0.9, 1.1, shape)
    path = draw_balance(before, after, tmp_path / "balance.png")
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    width, height = np.frombuffer(drawn[SIZE : SIZE + 8], ">u4")
    assert 800 <= width <= 2000
    assert 500 <= height <= 2000
    assert len(drawn) > 10_000


def test_the_picture_of_no_load_at_all_is_drawn(tmp_path):
    path = draw_balance(np.zeros((2, 4)), np.zeros((2, 4)), tmp_path / "balance.png")
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("other", [(2, 5), (3, 4), (4,), (2, 0)])
def test_a_picture_of_loads_that_do_not_compare_is_refused(other, tmp_path):
    first = other if other == (2, 0) else (2, 4)
    with pytest.raises(ValueError, match="loads_before is"):
        draw_balance(np.ones(first), np.ones(other), tmp_path / "balance.png")
