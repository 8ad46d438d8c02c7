"""Rates where the operations are known by formula; blanks elsewhere."""

from dataclasses import replace

import pytest

from dsjax.model.sizes import training_work
from dsjax.train import kinds
from dsjax.train.peak import Peak
from dsjax.train.trace import Operation, Timeline
from dsjax.train.work import by_kind, flops_by_kind, with_matmuls_told
from tests.tiny import CONFIG

FLOPS = {
    kinds.ATTENTION_FORWARD: 1e9, kinds.ATTENTION_BACKWARD: 2e9, kinds.EXPERTS: 4e9,
    kinds.HEAD: 3e9, kinds.DENSE: 6e9,
}  # fmt: skip
PEAK = Peak(1e12, 2e12)


def operation(kind: str, ms: float, fp8: bool = False) -> Operation:
    return Operation(kind, kind, "", 1.0, ms * 1e-3, None, fp8)


def line(*operations: Operation, idle: float = 0.0) -> Timeline:
    busy = sum(each.seconds for each in operations)
    return Timeline(busy + idle * 1e-3, list(operations), 1)


def rows(*operations: Operation, peak: Peak | None = PEAK, idle: float = 0.0) -> dict:
    found = by_kind(with_matmuls_told(line(*operations, idle=idle)), FLOPS, peak)
    return {row.kind: row for row in found}


@pytest.mark.parametrize(
    "changes", [{}, {"mtp_depth": 2}, {"shared_experts": 0}, {"dense_layers": 3}, {"top_k": 1}]
)
def test_the_parts_are_those_of_the_formula(changes):
    model = replace(CONFIG, **changes)
    found, seq_len = flops_by_kind(model, 64), 64
    assert sum(found.values()) == pytest.approx(training_work(model, seq_len).causal)
    deep = model.layers + model.mtp_depth
    attention = 6 * deep * model.heads * (model.qk_dim + model.v_dim) * seq_len / 2
    assert found[kinds.ATTENTION_FORWARD] == pytest.approx(attention / 3)
    assert found[kinds.ATTENTION_BACKWARD] == pytest.approx(attention * 2 / 3)
    assert found[kinds.HEAD] == 6 * model.dim * model.vocab_size * (1 + model.mtp_depth)
    moe = model.moe_layers + model.mtp_depth
    assert found[kinds.EXPERTS] == 6 * moe * model.top_k * 3 * model.dim * model.expert_hidden


def test_rates_and_shares_of_the_peak():
    found = rows(operation(kinds.ATTENTION_FORWARD, 2), operation(kinds.HEAD, 4),
                 operation(kinds.DENSE, 10), operation(kinds.COPY, 3), idle=1)  # fmt: skip
    attention, copies = found[kinds.ATTENTION_FORWARD], found[kinds.COPY]
    assert attention.rate == pytest.approx(0.5e12)
    assert attention.share_of_peak == pytest.approx(0.5)
    assert attention.share == pytest.approx(2 / 20)
    assert (copies.flops, copies.rate, copies.share_of_peak) == (None, None, None)
    assert sum(row.share for row in found.values()) == pytest.approx(19 / 20)


def test_the_peak_is_that_of_the_formats_as_they_share_the_time():
    fast, slow = operation(kinds.EXPERTS, 3, fp8=True), operation(kinds.EXPERTS, 1)
    assert rows(fast)[kinds.EXPERTS].peak == 2e12
    assert rows(slow)[kinds.EXPERTS].peak == 1e12
    mixed = rows(fast, slow)[kinds.EXPERTS]
    assert mixed.peak == pytest.approx(1.75e12)
    assert mixed.share_of_peak == pytest.approx(4e9 / (3e-3 * 2e12 + 1e-3 * 1e12))


def test_a_card_without_fp8_and_one_of_unknown_peak():
    fast = operation(kinds.EXPERTS, 3, fp8=True)
    assert rows(fast, peak=Peak(1e12, None))[kinds.EXPERTS].peak == 1e12
    unknown = rows(fast, peak=None)[kinds.EXPERTS]
    assert unknown.rate == pytest.approx(4e9 / 3e-3)
    assert (unknown.peak, unknown.share_of_peak) == (None, None)


def test_little_of_unknown_scope_goes_to_the_dense_matmuls():
    found = rows(operation(kinds.HEAD, 40), operation(kinds.DENSE, 59.5),
                 operation(kinds.MATMUL, 0.5))  # fmt: skip
    assert set(found) == {kinds.HEAD, kinds.DENSE}
    assert found[kinds.DENSE].seconds == pytest.approx(60e-3)


def test_matmuls_that_cannot_be_told_apart_are_one_kind():
    told = (operation(kinds.EXPERTS, 1), operation(kinds.ATTENTION_FORWARD, 1),
            operation(kinds.ATTENTION_BACKWARD, 1))  # fmt: skip
    found = rows(operation(kinds.HEAD, 4), operation(kinds.DENSE, 3),
                 operation(kinds.MATMUL, 2), *told)  # fmt: skip
    assert set(found) == {each.kind for each in told} | {kinds.MATMUL}
    assert found[kinds.MATMUL].rate == pytest.approx(9e9 / 9e-3)
    assert set(rows(operation(kinds.DENSE, 3))) == {kinds.MATMUL}


def test_kinds_that_do_not_occur_are_with_the_matmuls_not_told_apart():
    assert rows(operation(kinds.MATMUL, 2))[kinds.MATMUL].flops == sum(FLOPS.values())
