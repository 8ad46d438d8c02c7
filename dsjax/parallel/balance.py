"""Which experts get a second replica and which GPU holds what: DeepSeek's EPLB (V3 report, 3.4).

Three greedy steps: groups of experts are packed onto nodes, so that a token's groups lie together;
within a node the expert with the heaviest replicas gets one more, until all places are taken; the
replicas are packed onto the node's GPUs. Where groups cannot be divided evenly over the nodes, all
GPUs count as one node and all experts as one group: the global policy.

Python walks over the items of one node, in each step over all layers and nodes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Int, Num

HEAVIEST = 1e30
"""A load above it might take its layer's sum, a float32, to infinity."""


class ExpertPlan(NamedTuple):
    """Physical experts are numbered GPU by GPU; int32 throughout."""

    physical_to_logical: Int[np.ndarray, "l replicas"]
    """The expert that each place holds."""
    logical_to_physical: Int[np.ndarray, "l e most"]
    """The places of each expert's replicas, behind them -1."""
    logical_count: Int[np.ndarray, "l e"]
    """Replicas of each expert, at least one."""


def rebalance_experts(
    weight: Num[np.ndarray, "l e"],
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
) -> ExpertPlan:
    """Places for `num_replicas` replicas of every layer's experts that spread their loads evenly.

    weight: the load of each expert, any unit; computed with as float32. The results are those of
    deepseek-ai/EPLB with ties going to the first: hierarchical where `num_nodes` divides
    `num_groups`, else global. One GPU may hold an expert twice. Raises ValueError where the
    weights or the numbers cannot be balanced, naming the value.
    """
    loads = _checked_loads(weight)
    layers, experts = loads.shape
    _check_sizes(experts, num_replicas, num_groups, num_nodes, num_gpus)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    physical, rank, count = _hierarchical(loads, num_replicas, num_groups, num_nodes, num_gpus)
    places = np.full((layers, experts, count.max()), -1, np.int32)
    places[np.arange(layers)[:, None], physical, rank] = np.arange(num_replicas, dtype=np.int32)
    return ExpertPlan(physical.astype(np.int32), places, count.astype(np.int32))


def _hierarchical(
    loads_LE: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The expert at each place, which of its replicas that is, and the replicas of each expert."""
    layers, experts = loads_LE.shape
    members = np.arange(experts).reshape(groups, -1)
    by_group = loads_LE.reshape(layers, *members.shape).sum(axis=-1)
    by_node = members[_pack(by_group, nodes)].reshape(layers, experts)
    loads = np.take_along_axis(loads_LE, by_node, axis=1).reshape(layers * nodes, -1)
    local, rank, count, share = _replicate(loads, replicas // nodes)
    held = _pack(share, gpus // nodes)
    local, rank = (np.take_along_axis(each, held, axis=1) for each in (local, rank))
    first = np.arange(0, experts, experts // nodes)[:, None]
    inside = (local.reshape(layers, nodes, -1) + first).reshape(layers, replicas)
    counts = np.empty((layers, experts), int)
    np.put_along_axis(counts, by_node, count.reshape(layers, experts), axis=1)
    return np.take_along_axis(by_node, inside, axis=1), rank.reshape(layers, replicas), counts


def _pack(loads_XN: np.ndarray, packs: int) -> np.ndarray:
    """The items [x, n] pack after pack: heaviest first, each goes to the lightest with room."""
    rows, items = loads_XN.shape
    room = items // packs
    if room == 1:
        return np.tile(np.arange(items), (rows, 1))
    order = np.argsort(-loads_XN, axis=1, kind="stable")
    descending = np.take_along_axis(loads_XN, order, axis=1)
    total = np.zeros(rows * packs, np.float32)
    filled = np.zeros(rows * packs, int)
    held = np.empty(rows * items, int)
    first = np.arange(rows) * packs
    for item, load in zip(order.T.copy(), descending.T.copy(), strict=True):
        pack = first + total.reshape(rows, packs).argmin(axis=1)
        taken = filled[pack]
        held[pack * room + taken] = item
        filled[pack] = taken + 1
        total[pack] = np.where(taken + 1 == room, np.inf, total[pack] + load)
    return held.reshape(rows, items)


def _replicate(loads_XN: np.ndarray, replicas: int) -> tuple[np.ndarray, ...]:
    """One more replica of the expert whose replicas are heaviest, until there are enough.

    Returns expert, number among its replicas and load, each [x, replicas] in the order of their
    making, and, third of the four, the replicas of each expert [x, n].
    """
    rows, experts = loads_XN.shape
    every = np.arange(rows)
    expert = np.tile(np.arange(replicas), (rows, 1))
    rank = np.zeros((rows, replicas), int)
    count = np.ones((rows, experts), int)
    share = loads_XN.copy()
    for place in range(experts, replicas):
        heaviest = share.argmax(axis=1)
        many = count[every, heaviest]
        expert[:, place], rank[:, place] = heaviest, many
        count[every, heaviest] = many + 1
        share[every, heaviest] = loads_XN[every, heaviest] / (many + 1)
    return expert, rank, count, np.take_along_axis(share, expert, axis=1)


def _checked_loads(weight: np.ndarray) -> np.ndarray:
    loads = np.asarray(weight, np.float64)
    if loads.ndim != 2 or not loads.size:
        raise ValueError(f"weight is {loads.shape}: expected [layers, experts], neither zero")
    wrong = np.argwhere(~((loads >= 0) & (loads <= HEAVIEST)))
    if len(wrong):
        layer, expert = wrong[0]
        raise ValueError(
            f"weight of expert {expert} in layer {layer} is {loads[layer, expert]}: loads are "
            f"finite, 0 to {HEAVIEST}"
        )
    return loads.astype(np.float32)


def _check_sizes(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    sizes = {"num_groups": groups, "num_nodes": nodes, "num_gpus": gpus}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: at least 1")
    if replicas < experts:
        raise ValueError(f"num_replicas is {replicas}: fewer than the {experts} experts")
    _check_divides("num_replicas", replicas, "num_gpus", gpus)
    _check_divides("the number of experts", experts, "num_groups", groups)
    _check_divides("num_gpus", gpus, "num_nodes", nodes)


def _check_divides(name: str, number: int, parts_name: str, parts: int) -> None:
    if number % parts:
        raise ValueError(f"{name} is {number}: not a multiple of {parts_name}, {parts}")
