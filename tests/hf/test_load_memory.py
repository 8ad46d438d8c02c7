"""Loading and saving need the model's size and about one tensor, measured on a 140 MB model."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsjax.hf import config_json
from dsjax.hf.folder import SINGLE
from dsjax.hf.names import table
from dsjax.hf.safetensors import Spec, write
from dsjax.model import Transformer

MEASURE = """
import resource, sys, jax, numpy as np
from dsjax.hf import from_pretrained, save_pretrained
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(3)))
start = peak()
model = from_pretrained(sys.argv[1])
loaded = peak()
save_pretrained(model, sys.argv[2])
print(loaded - start, peak() - start)
"""
SLACK = 50e6
"""Compiled programs and the allocator; less than half of the model."""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units")
def test_peak_is_the_model_and_one_tensor(tiny, tmp_path):
    config = replace(tiny, vocab_size=16384, dim=512, expert_hidden=512, experts=32)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))}
    bf16, f32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
    specs = [
        Spec(row.name, f32 if "bias" in row.name else bf16, row.shape(shapes[row.path]))
        for row in table(config)
    ]
    sizes = {spec.name: spec for spec in specs}
    (tmp_path / "a").mkdir()
    write(
        tmp_path / "a" / SINGLE, specs, lambda name: np.ones(sizes[name].shape, sizes[name].dtype)
    )
    settings = config_json.from_model(config, dtype="bfloat16", fp8=False)
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    # One threshold for the allocator: freed arrays leave memory at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "a", tmp_path / "b"],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    model, tensor = sum(spec.nbytes for spec in specs), max(spec.nbytes for spec in specs)
    assert model > 120e6
    for used in map(int, done.stdout.split()):
        assert used - model < tensor + SLACK
