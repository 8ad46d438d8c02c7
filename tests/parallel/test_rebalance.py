"""EPLB's published results, and those of a slow restatement of it that shares no code."""

import sys

import numpy as np
import pytest

from dsjax.parallel.balance import HEAVIEST, rebalance_experts
from dsjax.parallel.loads import gpu_loads, imbalance

# The example of deepseek-ai/EPLB's README.
WEIGHT = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
SIZES = {"num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
LOADS = ("uniform", "zipf", "with zeros", "with ties", "all zero", "fractions")


def test_the_published_example_comes_out_bit_for_bit():
    physical, logical, count = rebalance_experts(WEIGHT, **SIZES)
    assert physical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert count.tolist() == [
        [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
        [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1],
    ]
    assert [[place for place in row if place >= 0] for row in logical[0].tolist()] == [
        [12], [15, 13], [11], [6], [7, 5], [0, 2], [1], [3], [4], [9], [8, 10], [14],
    ]  # fmt: skip
    assert [[place for place in row if place >= 0] for row in logical[1].tolist()] == [
        [13], [15, 11], [8], [14], [9], [10, 12], [2, 4], [0], [6, 3], [7], [1], [5],
    ]  # fmt: skip
    loads = gpu_loads(WEIGHT, physical, count, 8)
    assert loads[0].tolist() == [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    assert loads[1].tolist() == [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5]


def test_groups_that_nodes_cannot_share_evenly_are_balanced_globally():
    physical, _, count = rebalance_experts(WEIGHT, **{**SIZES, "num_groups": 3})
    assert physical.tolist() == [
        [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7],
    ]
    even = imbalance(gpu_loads(WEIGHT, physical, count, 8))
    np.testing.assert_allclose(even, [1.073, 1.190], atol=5e-4)


def test_loads_are_added_up_in_float32_as_published():
    heavy = 2**24  # 2**24 + 1 is no float32, so the first pack seems no heavier with it
    plan = rebalance_experts(np.array([[heavy, heavy, 1, 1, 1, 1]]), 6, 1, 1, 2)
    assert plan.physical_to_logical.tolist() == [[0, 2, 3, 1, 4, 5]]


def slow_pack(loads: list, packs: int) -> list[list[int]]:
    """The items of each pack, in the order in which they came."""
    room = len(loads) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    held, total = [[] for _ in range(packs)], [np.float32(0)] * packs
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        open_packs = [pack for pack in range(packs) if len(held[pack]) < room]
        lightest = min(open_packs, key=lambda pack: total[pack])
        held[lightest].append(item)
        total[lightest] = total[lightest] + loads[item]
    return held


def slow_layer(loads: list, replicas: int, groups: int, nodes: int, gpus: int) -> list:
    """The (expert, number of the replica) at each place of one layer."""
    if groups % nodes:
        groups = nodes = 1
    size = len(loads) // groups
    members = [list(range(group * size, group * size + size)) for group in range(groups)]
    by_group = [sum((loads[e] for e in group), start=np.float32(0)) for group in members]
    places = []
    for on_node in slow_pack(by_group, nodes):
        experts = [expert for group in on_node for expert in members[group]]
        made = [(expert, 0) for expert in experts]
        count = dict.fromkeys(experts, 1)
        while len(made) < replicas // nodes:
            heaviest = max(experts, key=lambda e: loads[e] / np.float32(count[e]))
            made.append((heaviest, count[heaviest]))
            count[heaviest] += 1
        shares = [loads[expert] / np.float32(count[expert]) for expert, _ in made]
        for on_gpu in slow_pack(shares, gpus // nodes):
            places.extend(made[item] for item in on_gpu)
    return places


def draw_loads(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Sums of a group's loads are exact in float32, so that their order does not matter."""
    if kind == "zipf":
        return np.minimum(rng.zipf(1.3, shape), 10**6)
    if kind == "fractions":
        return rng.integers(0, 10**5, shape) / 64
    drawn = rng.integers(1, 10**5, shape)
    if kind == "with zeros":
        return drawn * rng.integers(0, 2, shape)
    if kind == "with ties":
        return rng.integers(1, 4, shape)
    return drawn * (kind != "all zero")


def draw_sizes(rng: np.random.Generator) -> tuple[int, int, int, int, int]:
    """experts, replicas, groups, nodes, GPUs; hierarchical two times of three."""
    nodes = int(rng.integers(1, 5))
    gpus = nodes * int(rng.integers(1, 4))
    groups = nodes * int(rng.integers(1, 4)) if rng.random() < 0.6 else int(rng.integers(1, 6))
    experts = groups * int(rng.integers(1, 5))
    replicas = gpus * (-(-experts // gpus) + int(rng.integers(0, 4)))
    return experts, replicas, groups, nodes, gpus


@pytest.mark.parametrize("kind", LOADS)
def test_results_equal_the_slow_restatement(kind):
    rng = np.random.default_rng(LOADS.index(kind))
    seen = set()
    for _ in range(170):
        experts, *sizes = draw_sizes(rng)
        weight = draw_loads(rng, kind, (int(rng.integers(1, 4)), experts))
        plan = rebalance_experts(weight, *sizes)
        for layer, loads in enumerate(weight.astype(np.float32)):
            wanted = slow_layer(list(loads), *sizes)
            assert plan.physical_to_logical[layer].tolist() == [expert for expert, _ in wanted]
            for place, (expert, number) in enumerate(wanted):
                assert plan.logical_to_physical[layer, expert, number] == place
        seen.add(sizes[1] % sizes[2] == 0)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("experts", "sizes"),
    [(64, (96, 8, 4, 16)), (64, (96, 8, 3, 24)), (64, (64, 8, 8, 64)), (6, (24, 2, 2, 4))],
)
def test_a_plan_is_whole_and_its_maps_agree(experts, sizes):
    replicas, groups, nodes, _ = sizes
    weight = np.random.default_rng(experts).pareto(1, (5, experts))
    plan = rebalance_experts(weight, *sizes)
    assert all(each.dtype == np.int32 for each in plan)
    assert plan.logical_to_physical.shape == (5, experts, plan.logical_count.max())
    np.testing.assert_array_equal(plan.logical_count.sum(axis=1), replicas)
    for layer in range(5):
        for expert, places in enumerate(plan.logical_to_physical[layer]):
            count = plan.logical_count[layer, expert]
            found = np.flatnonzero(plan.physical_to_logical[layer] == expert)
            assert sorted(places[:count]) == found.tolist()
            assert (places[count:] == -1).all()
    if groups % nodes == 0:
        node_of_place = np.arange(replicas) // (replicas // nodes)
        group = plan.physical_to_logical // (experts // groups)
        for layer in range(5):
            pairs = set(zip(group[layer].tolist(), node_of_place.tolist(), strict=True))
            assert len(pairs) == groups  # each group lies on one node


def test_a_layer_is_balanced_alike_whatever_the_others_are():
    weight = np.random.default_rng(3).pareto(1, (7, 32))
    together = rebalance_experts(weight, 48, 4, 2, 8)
    for layer in range(7):
        alone = rebalance_experts(weight[layer : layer + 1], 48, 4, 2, 8)
        np.testing.assert_array_equal(
            alone.physical_to_logical[0], together.physical_to_logical[layer]
        )


def lines_run(weight: np.ndarray, *sizes: int) -> int:
    """Lines of Python that a plan of `weight` takes, in the file that makes it."""
    lines, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal lines
        if not frame.f_code.co_filename.endswith("balance.py"):
            return None
        lines += event == "line"
        return trace

    sys.settrace(trace)
    try:
        rebalance_experts(weight, *sizes)
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("nodes", [4, 3])
def test_python_walks_over_items_and_never_over_layers(nodes):
    weight = np.random.default_rng(nodes).pareto(1, (58, 64))
    sizes = (96, 8, nodes, 24)
    many, one = lines_run(weight, *sizes), lines_run(weight[:1], *sizes)
    assert many == one
    assert 0 < many < 20 * sizes[0]


def planted(value: float) -> np.ndarray:
    weight = WEIGHT.astype(float)
    weight[1, 5] = value
    return weight


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": WEIGHT[0]}, r"weight is \(12,\)"),
        ({"weight": WEIGHT[None]}, r"weight is \(1, 2, 12\)"),
        ({"weight": WEIGHT[:0]}, r"weight is \(0, 12\)"),
        ({"weight": planted(-1)}, r"expert 5 in layer 1 is -1\.0"),
        ({"weight": planted(np.nan)}, "expert 5 in layer 1 is nan"),
        ({"weight": planted(np.inf)}, "expert 5 in layer 1 is inf"),
        ({"weight": planted(1e39)}, r"expert 5 in layer 1 is 1e\+39"),
        ({"num_replicas": 8}, "num_replicas is 8: fewer than the 12"),
        ({"num_replicas": 18}, "num_replicas is 18: not a multiple of num_gpus, 8"),
        ({"num_groups": 5}, "experts is 12: not a multiple of num_groups, 5"),
        ({"num_nodes": 3}, "num_gpus is 8: not a multiple of num_nodes, 3"),
        ({"num_groups": 0}, "num_groups is 0"),
        ({"num_nodes": -2}, "num_nodes is -2"),
        ({"num_gpus": 0}, "num_gpus is 0"),
    ],
)
def test_what_cannot_be_balanced_is_refused_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(**{"weight": WEIGHT, **SIZES, **changed})


def test_the_heaviest_loads_allowed_leave_no_pack_overfull():
    plan = rebalance_experts(np.full((1, 256), HEAVIEST), 288, 8, 4, 32)
    np.testing.assert_array_equal(np.unique(plan.physical_to_logical), np.arange(256))
