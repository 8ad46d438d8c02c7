"""Training in FP8: as good as BF16, resumed bit for bit, what its records say, how it ends."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from dsjax.commands.recipes import CONFIGS, load_recipe
from dsjax.train import train
from dsjax.train.notes import as_notes, from_notes
from dsjax.train.restore import load_run
from dsjax.train.runtime import Runtime, load_corpus

FITTING = {"kv_lora_rank": 32, "qk_nope_dim": 16, "qk_rope_dim": 16, "v_dim": 16}
COUNTS = {
    "fp8_zero_inputs", "fp8_zero_inputs_most", "fp8_zero_gradients", "fp8_zero_gradients_most",
    "fp8_overflowed_tiles",
}  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=400)


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def fp8_run(tiny_run, **train_changes):
    return tiny_run(
        precision="fp8", model=FITTING, train={"steps": 4, "eval_every": 4, **train_changes}
    )


@pytest.mark.usefixtures("on_one_device")
def test_a_stopped_and_resumed_run_is_bit_equal_and_counts_what_fp8_loses(
    tiny_run, tmp_path, same_bits
):
    straight = train(fp8_run(tiny_run, micro_batches=2), tmp_path / "straight", console=quiet())
    run = fp8_run(tiny_run, micro_batches=2)
    part = tmp_path / "part"
    train(run, part, console=quiet())
    shutil.rmtree(part / "checkpoints" / "00000004")  # back to step 2
    resumed = train(run, part, resume=True, console=quiet())
    assert resumed.step == straight.step == 4
    assert same_bits(resumed.state, straight.state)
    for record, other in zip(records(part), records(tmp_path / "straight"), strict=True):
        assert record.keys() >= COUNTS
        assert {name: record[name] for name in COUNTS} == {name: other[name] for name in COUNTS}
        assert record["fp8_overflowed_tiles"] == 0
        assert 0 < record["fp8_zero_inputs"] <= record["fp8_zero_inputs_most"] < 0.1
        assert 0 < record["fp8_zero_gradients"] <= record["fp8_zero_gradients_most"] < 0.5
    model, _ = load_run(part)
    logits = jax.jit(lambda m, t: m(t))(model, jnp.zeros((1, 4), jnp.int32))
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()


def test_weights_that_layers_would_keep_are_refused(tiny_run):
    run = fp8_run(tiny_run)
    with pytest.raises(ValueError, match=r"fp8 on \d+ devices with mesh zero=3.*use remat v3"):
        Runtime(run, load_corpus(run))


def test_a_checkpoint_from_before_fp8_keeps_its_settings(tiny_run):
    notes = as_notes(tiny_run())
    del notes["fp8"]
    assert from_notes(notes) == tiny_run()


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_the_tiny_recipe_in_fp8_is_within_one_per_cent_of_bf16():
    """Simulated on the CPU. Means over 50 steps: single batches differ by more."""
    tiny, steps, window = load_recipe(CONFIGS / "tiny.py"), 120, 50
    corpus, means = load_corpus(tiny), {}
    for precision in ("bf16", "fp8"):
        runtime = Runtime(dataclasses.replace(tiny, precision=precision), corpus)
        state, losses = runtime.initial(), []
        for n in range(steps):
            state, metrics = runtime.step(state, runtime.stream.batch(n))
            losses.append(metrics["loss"])
        means[precision] = float(np.mean(losses[-window:]))
    assert abs(means["fp8"] / means["bf16"] - 1) < 0.01, means
    assert means["fp8"] < 3
