"""The precision study: its variants, and the arithmetic of how far losses are apart."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dsjax.config import Fp8
from dsjax.train.metrics import JSONL
from dsjax.train.runtime import Runtime, load_corpus
from dsjax.train.study import BASE, VARIANTS, difference, read_curve, variant, write_study
from dsjax.train.study_picture import draw_study


def write_run(folder, losses, held_out=None, overflowed=None):
    folder.mkdir()
    more = {} if overflowed is None else {"fp8_overflowed_tiles": overflowed}
    lines = [
        {"kind": "train", "step": step, "loss": loss, **more}
        for step, loss in enumerate(losses, start=1)
    ]
    if held_out is not None:
        lines.append({"kind": "eval", "step": len(losses), "loss": held_out})
    (folder / JSONL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_variants_differ_in_precision_alone(tiny_run):
    run = tiny_run()
    found = {name: variant(run, name) for name in VARIANTS}
    assert {name: made.precision for name, made in found.items()} == {
        name: "bf16" if name.startswith("bf16") else "fp8" for name in VARIANTS
    }
    assert found["fp8"].fp8 == Fp8()
    assert found["fp8_unpromoted"].fp8 == Fp8(sum_bits=13)
    assert found["fp8_gradient_blocks"].fp8 == Fp8(gradient_blocks=True)
    for name, made in found.items():
        assert (made.model, made.data.paths, made.optimizer) == (
            run.model, run.data.paths, run.optimizer,
        )  # fmt: skip
        assert made.name == name
        seeds = (made.train.seed != run.train.seed, made.data_seed != run.data_seed)
        others = {"bf16_other_seed": (True, True), "bf16_other_weights": (True, False)}
        assert seeds == others.get(name, (False, False)), name


def test_an_unknown_variant_is_refused(tiny_run):
    with pytest.raises(ValueError, match=r"'fp4'.*bf16_again"):
        variant(tiny_run(), "fp4")


def test_difference_is_relative_smoothed_and_leaves_out_the_start(tmp_path):
    steps = np.arange(1, 1001)
    base = 2 + 1 / steps
    other = np.where(steps <= 100, 3 * base, base)  # gone from the window at step 200
    other[500:] *= 1.01
    curves = {
        name: read_curve(write_run(tmp_path / name, values.tolist(), 1.5), name)
        for name, values in ((BASE, base), ("fp8", other))
    }
    found = difference(curves["fp8"], curves[BASE])
    assert found.last == pytest.approx(0.01)
    assert found.most > 1.5  # right behind the tenth left out the window still holds the start
    row = json.loads(write_study(curves, tmp_path / "study.json").read_text())["runs"][1]
    assert (row["name"], row["steps"], row["held_out_loss"]) == ("fp8", 1000, 1.5)
    assert row["last"] == pytest.approx(0.01)
    assert draw_study(curves, tmp_path / "study.png").stat().st_size > 5000


def test_a_run_that_ended_early_is_compared_as_far_as_it_got(tmp_path):
    base = read_curve(write_run(tmp_path / "base", [2.0] * 50), BASE)
    short = read_curve(write_run(tmp_path / "short", [2.2] * 20, overflowed=1.0), "short")
    assert difference(short, base).last == pytest.approx(0.1)
    assert short.held_out is None
    assert short.overflowed == 20
    assert read_curve(tmp_path / "nothing", "nothing") is None


def test_other_weights_meet_the_same_batches(tiny_run):
    def first_batch(name):
        run = variant(replace(tiny_run(), precision="bf16"), name)
        return Runtime(run, load_corpus(run)).stream.batch(0)

    base = first_batch(BASE)
    np.testing.assert_array_equal(first_batch("bf16_other_weights"), base)
    assert (first_batch("bf16_other_seed") != base).any()
