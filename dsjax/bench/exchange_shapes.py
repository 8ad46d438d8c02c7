"""Which calls of an exchange between GPUs are timed: sizes, parts, and the cases that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

LinkKind = Literal["link_loads", "link_stores"]
CallKind = Literal[
    "layout", "dispatch_fp8", "dispatch_fp8_with_layout", "dispatch_bf16", "reduce", "combine",
    "combine_rows", "dispatch_and_product", "dispatch_beside_product", "combine_and_product",
    "combine_beside_product", "low_latency_dispatch", "low_latency_combine", "low_latency_round",
]  # fmt: skip
Kind = LinkKind | CallKind | Literal["soak"]
Part = Literal["links", "layout", "dispatch", "combine", "overlap", "low_latency"]
PARTS: tuple[Part, ...] = ("links", "layout", "dispatch", "combine", "overlap", "low_latency")
KINDS: dict[Part, tuple[CallKind, ...]] = {
    "layout": ("layout",),
    "dispatch": ("dispatch_fp8", "dispatch_fp8_with_layout", "dispatch_bf16"),
    "combine": ("reduce", "combine", "combine_rows"),
    "overlap": (
        "dispatch_and_product", "dispatch_beside_product", "combine_and_product",
        "combine_beside_product",
    ),
    "low_latency": ("low_latency_dispatch", "low_latency_combine", "low_latency_round"),
}  # fmt: skip
WITHOUT_CTAS: tuple[Kind, ...] = ("layout", "reduce")
LOW_LATENCY = 128  # tokens of a device that decodes
LINK_BYTES, LINK_CTAS = (7168, 14336), (32, 128)


@dataclass(frozen=True)
class Shape:
    """`tokens` a device, each to `top_k` of the experts of all; ctas 0 is the kernels' choice."""

    ranks: int
    tokens: int
    dim: int
    experts: int
    top_k: int
    ctas: int = 0

    def __str__(self) -> str:
        sizes = f"r{self.ranks}x{self.tokens}x{self.dim}x{self.top_k}of{self.experts}"
        return sizes + (f" ctas {self.ctas}" if self.ctas else "")

    @property
    def drawn(self) -> Shape:
        """What its operands depend on."""
        return replace(self, ctas=0)

    @property
    def local(self) -> int:
        """Experts of a device."""
        return self.experts // self.ranks

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a token with its scales in e4m3, and in bfloat16."""
        return self.dim + 4 * -(-self.dim // 128), 2 * self.dim


@dataclass(frozen=True)
class LinkShape:
    """`rows` of so many bytes between any two devices."""

    ranks: int
    rows: int
    bytes: int
    ctas: int

    def __str__(self) -> str:
        return f"r{self.ranks}x{self.rows}x{self.bytes} B ctas {self.ctas}"


Case = tuple[Kind, Shape | LinkShape]


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V3's, with 4096 tokens a device.

    ValueError for a size below 1 and more choices than experts.
    """

    tokens: int = 4096
    dim: int = 7168
    experts: int = 256
    top_k: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            if (size := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} is {size}: expected 1 or more")
        if self.top_k > self.experts:
            raise ValueError(f"top_k is {self.top_k}: expected at most experts = {self.experts}")

    def shape(self, ranks: int, tokens: int | None = None, ctas: int = 0) -> Shape:
        """On so many devices; ValueError where they cannot have equally many experts."""
        if self.experts % ranks:
            raise ValueError(
                f"experts is {self.experts}: expected a multiple of the {ranks} devices"
            )
        return Shape(ranks, tokens or self.tokens, self.dim, self.experts, self.top_k, ctas)


V3 = Sizes()


def select(sizes: Sizes, parts: Sequence[Part], ctas: Sequence[int], ranks: int) -> list[Case]:
    """The calls of the chosen parts in the order of PARTS, each with every number of CTAs.

    ValueError where there is none, and for numbers below 0.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        found = f"part {unknown[0]!r} is unknown" if unknown else "no parts are chosen"
        raise ValueError(f"{found}: give some of {', '.join(PARTS)}")
    if not ctas or min(ctas) < 0:
        found = f"has {min(ctas)}" if ctas else "is empty"
        raise ValueError(f"ctas {found}: expected SMs a kernel takes, or 0 for its own choice")
    sizes.shape(ranks)
    cases: list[Case] = _links(sizes, ranks) if "links" in parts else []
    for part in PARTS:
        tokens = min(sizes.tokens, LOW_LATENCY) if part == "low_latency" else sizes.tokens
        for kind in KINDS.get(part, ()) if part in parts else ():
            each = (0,) if kind in WITHOUT_CTAS else dict.fromkeys(ctas)
            cases += [(kind, sizes.shape(ranks, tokens, n)) for n in each]
    return cases


def _links(sizes: Sizes, ranks: int) -> list[Case]:
    kinds: tuple[LinkKind, ...] = ("link_loads", "link_stores")
    return [
        (kind, LinkShape(ranks, sizes.tokens, size, ctas))
        for kind in kinds
        for size in LINK_BYTES
        for ctas in LINK_CTAS
    ]
