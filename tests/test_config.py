"""Bad values are refused where a config is built, and every recipe is complete."""

import ast
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from dsjax.commands.compare import CompareCommand
from dsjax.commands.recipes import load_recipe
from dsjax.config import Balance, Data, Mesh, Model, Mtp, Optimizer, Run, Train, Yarn

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))

BAD = [
    (Yarn, {"factor": 0.5}, "0.5"),
    (Yarn, {"original_context": 0}, "0"),
    (Yarn, {"beta_fast": -32.0}, "-32.0"),
    (Model, {"vocab_size": 0}, "0"),
    (Model, {"dim": -7168}, "-7168"),
    (Model, {"layers": -3}, "-3"),
    (Model, {"dense_layers": 62}, "62"),
    (Model, {"dense_layers": -1}, "-1"),
    (Model, {"heads": 0}, "0"),
    (Model, {"q_lora_rank": 0}, "0"),
    (Model, {"qk_rope_dim": 63}, "63"),
    (Model, {"norm_eps": float("nan")}, "nan"),
    (Model, {"init_std": -0.006}, "-0.006"),
    (Model, {"mtp_depth": -2}, "-2"),
    (Model, {"shared_experts": -1}, "-1"),
    (Model, {"groups": 7}, "7"),
    (Model, {"top_groups": 9}, "9"),
    (Model, {"top_k": 129}, "129"),
    (Model, {"top_k": 0}, "0"),
    (Model, {"selection": "greedy", "top_k": 257}, "257"),
    (Model, {"groups": 256, "top_groups": 200}, "256"),
    (Data, {"seq_len": 1}, "1"),
    (Data, {"held_out": 0.0}, "0.0"),
    (Data, {"held_out": 1.5}, "1.5"),
    (Data, {"fim_rate": -0.1}, "-0.1"),
    (Optimizer, {"peak_lr": 0.0}, "0.0"),
    (Optimizer, {"b2": 1.01}, "1.01"),
    (Optimizer, {"clip_norm": -1.0}, "-1.0"),
    (Optimizer, {"constant_fraction": 0.75}, "1.07"),
    (Balance, {"bias_speed": -1e-3}, "-0.001"),
    (Balance, {"bias_until": 2.0}, "2.0"),
    (Balance, {"batch_aux": -0.5}, "-0.5"),
    (Mtp, {"weight": -0.3}, "-0.3"),
    (Mtp, {"late_from": 1.5}, "1.5"),
    (Train, {"steps": 0}, "0"),
    (Train, {"batch": 8, "micro_batches": 3}, "3"),
    (Train, {"batch": 8, "ramp_from": 16}, "16"),
    (Train, {"batch": 8, "micro_batches": 2, "ramp_from": 6}, "6"),
    (Train, {"ramp_fraction": 1.25}, "1.25"),
    (Mesh, {"data": 0}, "0"),
    (Mesh, {"fsdp": -2}, "-2"),
    (Mesh, {"data": -1, "fsdp": -1}, "-1"),
]


@pytest.mark.parametrize(
    ("kind", "fields", "shown"),
    BAD,
    ids=[f"{kind.__name__}-{'-'.join(map(str, fields.items()))}" for kind, fields, _ in BAD],
)
def test_bad_value_is_refused_and_named(kind, fields, shown):
    with pytest.raises(ValueError, match=r"[ =(]" + shown.replace(".", r"\.")) as refusal:
        kind(**fields)
    assert any(name in str(refusal.value) for name in [*fields, "axis", "fractions"])


@pytest.mark.parametrize("name", ["", "a/b", "../up"])
def test_run_name_must_be_one_plain_word(name):
    with pytest.raises(ValueError, match="name is") as refusal:
        Run(name=name, model=Model())
    assert repr(name) in str(refusal.value)


def test_sequences_must_fit_the_context():
    with pytest.raises(ValueError, match="seq_len=4096 exceeds the model's context=2048"):
        Run(name="short", model=Model(context=2048), data=Data(seq_len=4096))


def test_experts_are_not_checked_where_there_are_none():
    assert Model(layers=3, dense_layers=3, mtp_depth=0, experts=0, top_k=0).moe_layers == 0
    with pytest.raises(ValueError, match="experts is 0"):
        Model(layers=3, dense_layers=3, mtp_depth=1, experts=0)


def test_configs_are_frozen_and_comparable():
    model = Model()
    with pytest.raises(FrozenInstanceError):
        model.dim = 1
    assert model == Model()
    assert hash(model) == hash(Model())
    assert replace(model, dim=64) != model


def test_defaults_are_deepseek_v3():
    model = Model()
    assert (model.qk_dim, model.latent_dim, model.moe_layers) == (192, 576, 58)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_a_run(path):
    run = load_recipe(path)
    assert isinstance(run, Run)
    assert run.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_which_command_runs_it(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path.name} has no docstring"
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("python3 ")]
    compared = path.name in [recipe.name for recipe in CompareCommand().recipes]
    last_words = ("compare",) if compared else (f" configs/{path.name}",)
    assert any(line.endswith(last_words) for line in commands), text
