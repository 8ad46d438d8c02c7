"""How fast the operations of a step worked whose floating-point operations are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dsjax.model.sizes import training_work
from dsjax.train.kinds import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    BESIDE,
    DENSE,
    EXPERTS,
    HEAD,
    KINDS,
    MATMUL,
)

if TYPE_CHECKING:
    from dsjax.config import Model
    from dsjax.train.peak import Peak
    from dsjax.train.trace import Operation, Timeline

UNKNOWN = 0.01


@dataclass(frozen=True)
class KindTime:
    """All operations of a kind in a step on one device."""

    kind: str
    calls: float
    seconds: float
    share: float
    """Of the step as it was traced."""
    flops: float | None
    """Model FLOPs by formula: what is computed again does not count. None for other kinds."""
    peak: float | None
    """FLOP/s at most in the formats of its kernels, as they share its time; None if not known."""

    @property
    def rate(self) -> float | None:
        """FLOP/s."""
        return self.flops / self.seconds if self.flops and self.seconds else None

    @property
    def share_of_peak(self) -> float | None:
        return self.rate / self.peak if self.rate and self.peak else None


def flops_by_kind(model: Model, seq_len: int) -> dict[str, float]:
    """Model FLOPs of training on one token, causal: the parts of `training_work`.

    Each is what the whole grows by where that part is twice as wide, so that the formula stays in
    one place. The backward pass is twice the forward one.
    """

    def whole(model: Model) -> float:
        return training_work(model, 0).causal

    attention = training_work(model, seq_len).causal - whole(model)
    head = whole(replace(model, vocab_size=2 * model.vocab_size)) - whole(model)
    routed = replace(model, shared_experts=0)
    experts = whole(replace(routed, expert_hidden=2 * routed.expert_hidden)) - whole(routed)
    return {
        ATTENTION_FORWARD: attention / 3,
        ATTENTION_BACKWARD: attention * 2 / 3,
        EXPERTS: experts,
        HEAD: head,
        DENSE: whole(model) - head - experts,
    }


def with_matmuls_told(timeline: Timeline) -> Timeline:
    """The timeline with dense matmuls and the head's told apart, or one kind.

    One kind where none is known to be the head's, or where more than `UNKNOWN` of their time is of
    unknown scope. Less than that goes to the dense ones.
    """
    seconds = dict.fromkeys((HEAD, DENSE, MATMUL), 0.0)
    for operation in timeline.operations:
        if operation.kind in seconds:
            seconds[operation.kind] += operation.seconds
    told = seconds[HEAD] and seconds[MATMUL] <= UNKNOWN * sum(seconds.values())
    to = {MATMUL: DENSE} if told else dict.fromkeys(seconds, MATMUL)
    operations = [replace(each, kind=to.get(each.kind, each.kind)) for each in timeline.operations]
    return replace(timeline, operations=operations)


def by_kind(timeline: Timeline, flops: dict[str, float], peak: Peak | None) -> list[KindTime]:
    """Times and rates by kind, in the order of KINDS.

    flops: of a step on one device. Those of kinds that do not occur are left to the matmuls that
    are not told apart; dense ones of which some run beside an exchange have no rate.
    """
    grouped: dict[str, list[Operation]] = {}
    for operation in timeline.operations:
        grouped.setdefault(operation.kind, []).append(operation)
    left = sum(count for kind, count in flops.items() if kind not in grouped)
    known = {kind: count for kind, count in flops.items() if kind != DENSE or BESIDE not in grouped}
    flops = {**known, MATMUL: left}
    return [
        _kind_time(kind, grouped[kind], timeline.seconds, flops.get(kind), peak)
        for kind in KINDS
        if kind in grouped
    ]


def _kind_time(
    kind: str, found: Sequence[Operation], step: float, flops: float | None, peak: Peak | None
) -> KindTime:
    seconds = sum(operation.seconds for operation in found)
    in_fp8 = sum(operation.seconds for operation in found if operation.fp8)
    most = None
    if peak and flops and seconds:
        share = in_fp8 / seconds
        most = share * (peak.fp8 or peak.bf16) + (1 - share) * peak.bf16
    calls = sum(operation.calls for operation in found)
    return KindTime(kind, calls, seconds, seconds / step, flops, most)
