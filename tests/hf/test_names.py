"""The table of names against the published index of DeepSeek-R1."""

import math

import numpy as np
from flax import nnx

from dsjax.config import Model
from dsjax.hf.fp8 import scale_shape
from dsjax.hf.names import SCALE, table
from dsjax.model import Transformer


def test_full_size_table_counts_what_was_published():
    """R1's 163 files hold 91,991 tensors of 684,531,386,000 elements, scales and MTP included."""
    abstract = nnx.eval_shape(lambda: Transformer(Model(), rngs=nnx.Rngs(0)))
    leaves = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    shapes = {}
    for row in table(Model()):
        shapes[row.name] = row.shape(leaves[row.path])
        if row.fp8:
            shapes[row.name + SCALE] = scale_shape(shapes[row.name])
    assert len(shapes) == 91_991
    assert sum(map(math.prod, shapes.values())) == 684_531_386_000
    assert shapes["model.layers.60.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes["model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)


def test_every_element_belongs_to_exactly_one_tensor(tiny):
    abstract = nnx.eval_shape(lambda: Transformer(tiny, rngs=nnx.Rngs(0)))
    leaves = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    written = {path: np.zeros(shape, int) for path, shape in leaves.items()}
    for row in table(tiny):
        leaf = leaves[row.path]
        cut = tuple(
            slice(begin, begin + size)
            for begin, size in zip(
                row.start(leaf), (1,) * len(row.index) + row.block(leaf), strict=True
            )
        )
        written[row.path][cut] += 1
    assert all((count == 1).all() for count in written.values())
