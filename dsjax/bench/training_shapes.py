"""Which calls of a training step are timed: a model's sizes, and the shapes that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

CastKind = Literal[
    "quantize_tiles", "quantize_both", "quantize_transposed", "requantize_transposed",
    "quantize_blocks_both", "rmsnorm_quantize",
]  # fmt: skip
SwigluKind = Literal["swiglu_quantize_both", "swiglu_backward"]
PermuteKind = Literal["spread_rows", "spread_quantized", "combine_rows"]
HeadKind = Literal["linear_cross_entropy", "linear_cross_entropy_grad"]
Kind = CastKind | SwigluKind | PermuteKind | HeadKind
Part = Literal["casts", "swiglu", "permute", "head"]
PARTS: tuple[Part, ...] = ("casts", "swiglu", "permute", "head")
Case = tuple[Kind, "Shape"]


@dataclass(frozen=True)
class Shape:
    """What a call works on; with groups, how many its rows lie in.

    m rows of k columns, or SwiGLU's 2f; weights [n, k] or [e, n, k]; a permutation of T tokens to k
    of the groups, d wide; a head's b x t tokens, d wide, with p targets.
    """

    axes: tuple[int, ...]
    groups: int = 0

    def __str__(self) -> str:
        return (f"g{self.groups}x" if self.groups else "") + "x".join(map(str, self.axes))


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V2-Lite on 8 sequences of 4096 tokens.

    ValueError for a size below 1, tokens that `batch` sequences cannot share evenly, and more
    choices than experts.
    """

    tokens: int = 32768
    batch: int = 8
    dim: int = 2048
    experts: int = 64
    top_k: int = 6
    expert_hidden: int = 1408
    shared_hidden: int = 2816
    vocab_size: int = 102400

    def __post_init__(self) -> None:
        for field in fields(self):
            if (size := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} is {size}: expected 1 or more")
        if self.tokens % self.batch:
            raise ValueError(
                f"tokens is {self.tokens}: expected a multiple of batch = {self.batch}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}: expected at most experts = {self.experts}")


LITE = Sizes()


def select(sizes: Sizes, parts: Sequence[Part]) -> list[Case]:
    """The calls of the chosen parts, in the order of PARTS; ValueError where there is none."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        found = f"part {unknown[0]!r} is unknown" if unknown else "no parts are chosen"
        raise ValueError(f"{found}: give some of {', '.join(PARTS)}")
    cases = {"casts": _casts, "swiglu": _swiglu, "permute": _permute, "head": _head}
    return [case for part in PARTS if part in parts for case in cases[part](sizes)]


def flops(kind: Kind, shape: Shape) -> int:
    """Of the head's products, one forward and two backward; the others count as moving bytes."""
    if kind not in ("linear_cross_entropy", "linear_cross_entropy_grad"):
        return 0
    b, t, d, p = shape.axes
    return 2 * b * t * d * p * (3 if kind == "linear_cross_entropy_grad" else 1)


def _casts(sizes: Sizes) -> list[Case]:
    hidden = Shape((sizes.tokens, sizes.dim))
    return [
        ("quantize_tiles", hidden),
        ("quantize_both", hidden),
        ("quantize_both", _routed(sizes, 2 * sizes.expert_hidden)),
        ("quantize_transposed", Shape((sizes.tokens, sizes.shared_hidden))),
        ("quantize_transposed", _routed(sizes, sizes.expert_hidden)),
        ("requantize_transposed", hidden),
        ("requantize_transposed", _routed(sizes, sizes.dim)),
        ("quantize_blocks_both", Shape((sizes.dim, 2 * sizes.shared_hidden))),
        ("quantize_blocks_both", Shape((sizes.experts, sizes.dim, 2 * sizes.expert_hidden))),
        ("rmsnorm_quantize", hidden),
    ]


def _swiglu(sizes: Sizes) -> list[Case]:
    shared = Shape((sizes.tokens, 2 * sizes.shared_hidden))
    experts = _routed(sizes, 2 * sizes.expert_hidden)
    return [
        ("swiglu_quantize_both", shared),
        ("swiglu_quantize_both", Shape(experts.axes)),
        ("swiglu_backward", shared),
        ("swiglu_backward", experts),
    ]


def _permute(sizes: Sizes) -> list[Case]:
    shape = Shape((sizes.tokens, sizes.top_k, sizes.dim), sizes.experts)
    return [("spread_rows", shape), ("spread_quantized", shape), ("combine_rows", shape)]


def _head(sizes: Sizes) -> list[Case]:
    time = sizes.tokens // sizes.batch
    shape = Shape((sizes.batch, time, sizes.dim, sizes.vocab_size))
    return [("linear_cross_entropy", shape), ("linear_cross_entropy_grad", shape)]


def _routed(sizes: Sizes, width: int) -> Shape:
    """Rows of the routed experts, k a token."""
    return Shape((sizes.tokens * sizes.top_k, width), sizes.experts)
