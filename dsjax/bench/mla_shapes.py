"""Which attention is timed: shapes as text, their work, and the default lists."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dsjax.bench.shapes import Work
from pallas_kernels.latent_cache import BYTES, LATENT, WIDTH

Kind = Literal[
    "decode", "ragged", "fp8", "forward", "backward", "packed_forward", "packed_backward", "sparse"
]
Part = Literal["decode", "ragged", "fp8", "prefill", "sparse"]
Form = Literal["decode", "prefill", "sparse"]
PARTS: dict[Part, tuple[Kind, ...]] = {
    "decode": ("decode",),
    "ragged": ("ragged",),
    "fp8": ("fp8",),
    "prefill": ("forward", "backward", "packed_forward", "packed_backward"),
    "sparse": ("sparse",),
}
KINDS: tuple[Kind, ...] = tuple(kind for kinds in PARTS.values() for kind in kinds)
TAKES: dict[Part, Form] = {
    "decode": "decode", "ragged": "decode", "fp8": "decode", "prefill": "prefill",
    "sparse": "sparse",
}  # fmt: skip
FP8_CACHE: tuple[Kind, ...] = ("fp8", "sparse")
QK, VALUE = 192, 128  # widths of a head in prefill
FORM = (
    "bBxsSxhHxtT for decode, such as b128xs1xh128xt4096 (S queries of each of B requests, T tokens "
    "in the cache), bBxsSxhHxkK for sparse decode of K tokens a query, or bBxhHxtT for prefill"
)
Case = tuple[Kind, "Shape"]


@dataclass(frozen=True)
class Shape:
    """b requests of h heads: s queries each over t cached tokens or k chosen ones; in prefill s is
    0, and the t tokens are queries and keys."""

    b: int
    s: int
    h: int
    t: int = 0
    k: int = 0

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ValueError unless the text has one of the three forms with sizes of 1 or more."""
        size = r"([1-9]\d*)"
        found = re.fullmatch(f"b{size}(?:xs{size})?xh{size}x([tk]){size}", text, re.ASCII)
        if not found or (found[4] == "k" and not found[2]):
            raise ValueError(f"shape {text!r}: expected {FORM}")
        b, s, h, letter, length = found.groups()
        return cls(int(b), int(s or 0), int(h), **{letter: int(length)})

    def __str__(self) -> str:
        queries = f"xs{self.s}" if self.s else ""
        return f"b{self.b}{queries}xh{self.h}x" + (f"k{self.k}" if self.k else f"t{self.t}")

    @property
    def form(self) -> Form:
        return "sparse" if self.k else "decode" if self.s else "prefill"

    @property
    def mean(self) -> int:
        """Tokens that a query reads, causality left out."""
        return self.k or self.t


def token_bytes(kind: Kind) -> int:
    return BYTES if kind in FP8_CACHE else 2 * WIDTH


def work(kind: Kind, shape: Shape) -> Work:
    """Operations and bytes of a call.

    Decode: tokens of the cache once a request (sparse: a query), queries and output. Prefill: the
    causal half of both products, 2.5 times that for the backward pass; every operand and result
    once. Packed sequences are as many and as long as those of a batch.
    """
    b, s, h = shape.b, shape.s, shape.h
    if shape.form == "prefill":
        forward = b * h * shape.t**2 * (QK + VALUE)
        widths = 2 * (QK + VALUE)  # q, k, v, out
        if kind in ("forward", "packed_forward"):
            return Work(forward, 2 * b * h * shape.t * widths)
        return Work(5 * forward // 2, 2 * b * h * shape.t * (2 * widths))
    tokens = b * shape.mean * (s if kind == "sparse" else 1)
    ends = 2 * b * s * h * (WIDTH + LATENT)
    return Work(ends * shape.mean, tokens * token_bytes(kind) + ends)


def select(texts: Sequence[str], parts: Sequence[Part]) -> list[Case]:
    """Each shape in every chosen part that takes its form; without shapes, the default lists.

    ValueError for a shape that is malformed, fits no chosen part, or has more queries than tokens.
    """
    if not parts:
        raise ValueError(f"no parts are chosen: give some of {', '.join(PARTS)}")
    if not texts:
        return [case for part in _ordered(parts) for case in _cases(part, SHAPES[part])]
    shapes = list(dict.fromkeys(map(Shape.parse, texts)))
    for shape in shapes:
        _check(shape, parts)
    shapes.sort(key=lambda shape: (shape.h, shape.s, shape.b, shape.mean))
    return [
        case
        for part in _ordered(parts)
        for case in _cases(part, [shape for shape in shapes if shape.form == TAKES[part]])
    ]


def _ordered(parts: Sequence[Part]) -> list[Part]:
    return [part for part in PARTS if part in parts]


def _cases(part: Part, shapes: Sequence[Shape]) -> list[Case]:
    return [(kind, shape) for kind in PARTS[part] for shape in shapes]


def _check(shape: Shape, parts: Sequence[Part]) -> None:
    takes = [part for part in PARTS if TAKES[part] == shape.form]
    if not set(takes) & set(parts):
        raise ValueError(
            f"shape {shape} fits none of the parts {', '.join(parts)}: "
            f"one of that form needs {', '.join(takes)}"
        )
    if shape.form == "decode" and shape.t < shape.s:
        raise ValueError(
            f"shape {shape}: t is {shape.t}, expected at least s = {shape.s}, as the cache holds "
            "the queries' own tokens"
        )


def _grid(*sizes: Sequence[int], length: Literal["t", "k"] = "t") -> tuple[Shape, ...]:
    """Of heads, queries, requests and lengths: rows that share a program lie side by side."""
    return tuple(Shape(b, s, h, **{length: n}) for h, s, b, n in itertools.product(*sizes))


HEADS = (16, 64, 128)
SHAPES: dict[Part, tuple[Shape, ...]] = {
    "decode": _grid(HEADS, (1, 2), (1, 16, 64, 128), (4096, 8192, 16384, 32768)),
    "ragged": _grid(HEADS, (1,), (64, 128), (4096, 16384)),
    "fp8": _grid(HEADS, (1, 2), (16, 128), (4096, 32768)),
    "prefill": (Shape(2, 0, 128, 4096), Shape(1, 0, 128, 8192), Shape(8, 0, 16, 4096)),
    "sparse": _grid((64, 128), (1, 2), (1, 16, 64, 128), (2048,), length="k"),
}
