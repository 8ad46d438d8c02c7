"""The one table of names: each published tensor and the part of our model that it is.

Published matrices are [out, in]; ours are [in, out] with heads as an axis of their own, gate and
up side by side, and layers and experts stacked. Loading and saving walk the same table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dsjax.config import Model

Part = Literal["gate", "up"]
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Row:
    """One published tensor; `path` and `index` say where it lies in our model."""

    name: str
    path: tuple[str | int, ...]
    inputs: int = 0
    """Axes of ours that are the published `in`; 0 for a tensor stored as it is."""
    part: Part | None = None
    """Which half of our last axis it is."""
    fp8: bool = False
    """Whether FP8 checkpoints quantise it."""
    index: tuple[int, ...] = ()
    """Layer and expert, as far as ours are stacked."""
    copy: bool = False
    """A repetition of a tensor that is stored elsewhere under the same path."""

    def block(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor in our layout, within a leaf of the given shape."""
        block = leaf[len(self.index) :]
        return (*block[:-1], block[-1] // 2) if self.part else block

    def start(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Where the block begins within the leaf."""
        inner = [0] * (len(leaf) - len(self.index))
        if self.part == "up":
            inner[-1] = leaf[-1] // 2
        return (*self.index, *inner)

    def shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Published shape."""
        block = self.block(leaf)
        if not self.inputs:
            return block
        return math.prod(block[self.inputs :]), math.prod(block[: self.inputs])

    def ours(self, published: np.ndarray, leaf: tuple[int, ...]) -> np.ndarray:
        """A view of the published tensor as the block of the leaf, with the leaf's rank."""
        array = published.T if self.inputs else published
        return array.reshape((1,) * len(self.index) + self.block(leaf))

    def published(self, block: np.ndarray, leaf: tuple[int, ...]) -> np.ndarray:
        """The inverse of `ours`."""
        shape = self.shape(leaf)
        return block.reshape(shape[::-1]).T if self.inputs else block.reshape(shape)


def _linear(name: str, *path: str, inputs: int = 1, part: Part | None = None) -> Row:
    return Row(f"{name}.weight", path, inputs, part, fp8=True)


def _plain(name: str, *path: str, inputs: int = 0) -> Row:
    return Row(f"{name}.weight", path, inputs)


_TOP = (
    _plain("model.embed_tokens", "embed"),
    _plain("model.norm", "norm"),
    _plain("lm_head", "head", inputs=1),
)
_BLOCK = (
    _plain("input_layernorm", "attn_norm"),
    _linear("self_attn.kv_a_proj_with_mqa", "attn", "kv_down"),
    _plain("self_attn.kv_a_layernorm", "attn", "kv_norm"),
    _linear("self_attn.kv_b_proj", "attn", "kv_up"),
    _linear("self_attn.o_proj", "attn", "out", inputs=2),
    _plain("post_attention_layernorm", "mlp_norm"),
)
_Q = (_linear("self_attn.q_proj", "attn", "q"),)
_Q_LORA = (
    _linear("self_attn.q_a_proj", "attn", "q_down"),
    _plain("self_attn.q_a_layernorm", "attn", "q_norm"),
    _linear("self_attn.q_b_proj", "attn", "q_up"),
)
_MLP = (
    _linear("gate_proj", "gate_up", part="gate"),
    _linear("up_proj", "gate_up", part="up"),
    _linear("down_proj", "down"),
)
_ROUTER = (_plain("mlp.gate", "mlp", "router", "weight", inputs=1),)
_ROUTER_BIAS = (Row("mlp.gate.e_score_correction_bias", ("mlp", "router", "bias")),)
_MTP = (
    replace(_plain("embed_tokens", "embed"), copy=True),
    _plain("enorm", "enorm"),
    _plain("hnorm", "hnorm"),
    _plain("eh_proj", "project", inputs=1),
    _plain("shared_head.norm", "norm"),
    replace(_plain("shared_head.head", "head", inputs=1), copy=True),
)


def table(config: Model) -> Iterator[Row]:
    """Every published tensor of a model, in the order in which it is saved."""
    yield from _TOP
    for layer in range(config.layers):
        moe = layer >= config.dense_layers
        stack, index = ("moe", layer - config.dense_layers) if moe else ("dense", layer)
        yield from _place(_block(config, moe), f"model.layers.{layer}", (stack,), (index,))
    for depth in range(config.mtp_depth):
        prefix = mtp_prefix(config, depth)
        yield from _place(_MTP, prefix, ("mtp", depth))
        yield from _place(_block(config, True), prefix, ("mtp", depth, "block"))


def mtp_prefix(config: Model, depth: int) -> str:
    """MTP layers are numbered after the main ones."""
    return f"model.layers.{config.layers + depth}"


def _block(config: Model, moe: bool) -> Iterator[Row]:
    yield from _BLOCK
    yield from _Q if config.q_lora_rank is None else _Q_LORA
    if not moe:
        yield from _place(_MLP, "mlp", ("mlp",))
        return
    yield from _ROUTER
    if config.selection == "noaux_tc":
        yield from _ROUTER_BIAS
    for expert in range(config.experts):
        yield from _place(_MLP, f"mlp.experts.{expert}", ("mlp", "experts"), (expert,))
    if config.shared_experts:
        yield from _place(_MLP, "mlp.shared_experts", ("mlp", "shared"))


def _place(
    rows: Iterator[Row] | tuple[Row, ...],
    prefix: str,
    path: tuple[str | int, ...],
    index: tuple[int, ...] = (),
) -> Iterator[Row]:
    """The rows one level further out; copies keep the path of their original."""
    for row in rows:
        yield replace(
            row,
            name=f"{prefix}.{row.name}",
            path=row.path if row.copy else path + row.path,
            index=index + row.index,
        )
