"""Which products are timed: shapes as text, their work, and the default list."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["dense", "grouped", "masked", "wgrad", "bf16"]
KINDS: tuple[Kind, ...] = ("dense", "grouped", "masked", "wgrad", "bf16")
GROUPED: tuple[Kind, ...] = ("grouped", "masked", "bf16")
PLAIN: tuple[Kind, ...] = ("dense", "wgrad", "bf16")
BLOCK = 128  # columns, and rows of a weight, that share a scale
FORM = "MxNxK such as 4096x7168x2048, or gGxMxNxK with M rows a group such as g4x256x4096x7168"


@dataclass(frozen=True)
class Shape:
    """[M, K] times [N, K] transposed; with groups, each has M rows and an [N, K] of its own."""

    m: int
    n: int
    k: int
    groups: int = 0

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ValueError unless the text is MxNxK or gGxMxNxK with sizes of 1 or more."""
        found = re.fullmatch(r"(?:g([1-9]\d*)x)?([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
        if not found:
            raise ValueError(f"shape {text!r}: expected {FORM}")
        groups, *sizes = found.groups()
        return cls(*map(int, sizes), groups=int(groups or 0))

    def __str__(self) -> str:
        return (f"g{self.groups}x" if self.groups else "") + f"{self.m}x{self.n}x{self.k}"


class Work(NamedTuple):
    """Of one call: floating-point operations, and bytes if each operand moves once."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes


def work(kind: Kind, shape: Shape) -> Work:
    """Operands and scales read once, the output written once; sizes of groups are left out."""
    matrices, (m, n, k) = max(shape.groups, 1), (shape.m, shape.n, shape.k)
    k_blocks = -(-k // BLOCK)
    values, scales, out = (m + n) * k, 0, 2 * m * n
    if kind == "bf16":
        values *= 2
    elif kind == "wgrad":
        scales, out = (m + n) * k_blocks, 4 * m * n
    else:
        scales = (m + -(-n // BLOCK)) * k_blocks
    return Work(2 * matrices * m * n * k, matrices * (values + 4 * scales + out))


def select(texts: Sequence[str], kinds: Sequence[Kind]) -> list[tuple[Kind, Shape]]:
    """Each shape with every chosen kind that takes its form; without shapes, the default list.

    ValueError for a shape that is malformed, fits no chosen kind, or has sizes the kernels refuse.
    """
    if not kinds:
        raise ValueError(f"no kinds are chosen: give some of {', '.join(KINDS)}")
    if not texts:
        return [(kind, Shape.parse(text)) for kind in dict.fromkeys(kinds) for text in SHAPES[kind]]
    chosen = [(kind, shape) for shape in map(Shape.parse, texts) for kind in _taking(shape, kinds)]
    for kind, shape in chosen:
        _check(kind, shape)
    return sorted(dict.fromkeys(chosen), key=lambda case: KINDS.index(case[0]))


def _taking(shape: Shape, kinds: Sequence[Kind]) -> list[Kind]:
    takes = GROUPED if shape.groups else PLAIN
    if not (found := [kind for kind in kinds if kind in takes]):
        raise ValueError(
            f"shape {shape} fits none of the kinds {', '.join(kinds)}: "
            f"one of that form needs {', '.join(takes)}"
        )
    return found


def _check(kind: Kind, shape: Shape) -> None:
    """TMA's 16 bytes: rows of the operands, and of the output."""
    for letter, size, step in (("K", shape.k, 8 if kind == "bf16" else 16), ("N", shape.n, 8)):
        if size % step:
            raise ValueError(f"shape {shape}: {letter} is {size}, {kind} takes multiples of {step}")


SHAPES: dict[Kind, tuple[str, ...]] = {
    "dense": (
        "64x2112x7168", "64x24576x1536", "64x7168x16384", "128x4096x7168", "128x7168x2048",
        "4096x2112x7168", "4096x24576x1536", "4096x4096x7168", "4096x7168x16384",
        "4096x7168x2048", "8192x8192x8192",
        "1x7168x16384", "8x7168x16384", "16x7168x16384", "32x7168x16384",
    ),
    "grouped": (
        "g4x8192x4096x7168", "g4x8192x7168x2048", "g8x4096x4096x7168", "g8x4096x7168x2048",
    ),
    "masked": (
        "g1x1024x4096x7168", "g1x1024x7168x2048", "g2x512x4096x7168", "g2x512x7168x2048",
        "g4x256x4096x7168", "g4x256x7168x2048",
    ),
    "wgrad": ("4096x7168x4096", "7168x2048x4096", "7168x16384x4096"),
    "bf16": ("g4x8192x4096x7168", "g8x4096x7168x2048"),
}  # fmt: skip
