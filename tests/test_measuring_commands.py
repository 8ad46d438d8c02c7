"""run.py compare, precision and profile in this process."""

import json
import signal

import pytest

import run
from dsjax.commands import FAILED
from dsjax.train import runtime
from tests.test_command_line import (
    build_once,
    one_device,
    quick_compilation,
    recipe,
    refused,
    words,
    works,
    write_recipe,
)

__all__ = ["build_once", "one_device", "quick_compilation", "recipe", "refused", "words", "works"]

FITTING = [
    "--model.kv-lora-rank", "32", "--model.qk-nope-dim", "16", "--model.qk-rope-dim", "16",
    "--model.v-dim", "16",
]  # fmt: skip


def test_profile_of_no_steps(refused, recipe, tmp_path):
    assert "steps is 0" in refused("profile", recipe, "--steps", 0, "--out", tmp_path / "out")
    assert "top is 0" in refused("profile", recipe, "--top", 0, "--out", tmp_path / "out")


def test_profile_of_nothing(refused, recipe, tmp_path):
    assert "there is no recipe" in refused("profile", tmp_path / "nothing.py")
    (tmp_path / "file").touch()
    assert "file" in refused("profile", recipe, "--out", tmp_path / "file" / "out")


def test_profile_prints_and_writes_where_a_step_goes(works, recipe, tmp_path):
    text = works("profile", recipe, "--steps", 1, "--top", 3, "--out", tmp_path / "out")
    for said in ("tokens/s", "memory of one device", "moments", "where a traced step goes",
                 "experts, grouped matmul", "the 3 longest operations"):  # fmt: skip
        assert said in text
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert (found["steps"], found["tokens"]) == (1, 8 * 32)
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_profile_ends_after_the_step_in_which_ctrl_c_came(recipe, tmp_path, monkeypatch, capfd):
    step = runtime.Runtime.compile_step

    def compile_step(*arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(runtime.Runtime, "compile_step", compile_step)
    status = run.main(["profile", recipe, "--steps", "2", "--out", str(tmp_path / "out")])
    assert status == FAILED
    out, err = capfd.readouterr()
    assert err.strip() == "interrupted"
    assert "timing" not in out
    assert list((tmp_path / "out").iterdir()) == []


def test_compare_draws_both_recipes(works, words, tmp_path, recipe):
    recipes = [write_recipe(tmp_path / f"{name}.py", words, name) for name in ("one", "two")]
    text = works("compare", *recipes, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    for name in ("one", "two"):
        assert (tmp_path / "out" / name / "metrics.jsonl").is_file()
        assert f" {name} " in text


@pytest.mark.slow
def test_precision_compares_variants_and_trains_none_twice(works, recipe, tmp_path):
    out = tmp_path / "study"
    command = ["precision", recipe, "--out", out, *FITTING, "--train.steps", 4]
    text = works(*command, "--variants", "bf16", "fp8")
    assert "variant fp8 in" in text
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in json.loads((out / "study.json").read_text())["runs"]}
    assert list(rows) == ["bf16", "fp8"]
    assert 0 < rows["fp8"]["most"] < 0.05
    again = works(*command, "--variants", "bf16", "fp8")
    assert "variant bf16 is done" in again
    assert "variant fp8 is done" in again


def test_precision_refuses_an_unknown_variant(recipe, capfd):
    with pytest.raises(SystemExit):
        run.main(["precision", recipe, "--variants", "fp4"])
    assert "fp4" in capfd.readouterr().err
