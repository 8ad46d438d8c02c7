"""The published sizes come out of the recipes."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

from dsjax.commands.recipes import load_recipe
from dsjax.config import Model
from dsjax.model.sizes import measure, training_work
from tests.tiny import CONFIG, random_transformer

CONFIGS = Path(__file__).parents[2] / "configs"


def published(name: str) -> Model:
    return load_recipe(CONFIGS / f"{name}.py").model


def test_v3_has_671_billion_parameters_and_37_active():
    sizes = measure(published("v3"))
    assert round(sizes.total / 1e9, 1) == 671.0
    assert round(sizes.active / 1e9, 1) == 36.6


def test_v3_mtp_has_11_5_billion_without_the_projection():
    sizes = measure(published("v3"))
    assert round((sizes.mtp - sizes.mtp_projection) / 1e9, 1) == 11.5
    assert round((sizes.mtp_active - sizes.mtp_projection) / 1e9, 1) == 2.4


def test_v3_caches_70272_bytes_a_token():
    assert measure(published("v3")).cache_bytes == 70_272


def test_v2_has_236_billion_parameters_and_21_active():
    sizes = measure(published("v2"))
    assert round(sizes.total / 1e9) == 236
    assert round(sizes.active / 1e9) == 21
    assert sizes.mtp == sizes.mtp_projection == sizes.mtp_active == 0


def test_v2_caches_93_percent_less_than_deepseek_67b():
    """The report's figure counts V2's elements at 6 bits; in bf16 on both sides it is 82 %."""
    layers, kv_heads, head_dim, bf16 = 95, 8, 128, 2
    of_67b = 2 * layers * kv_heads * head_dim * bf16
    in_bf16 = measure(published("v2")).cache_bytes
    assert 1 - in_bf16 * 6 / 16 / of_67b == pytest.approx(0.933, abs=0.0005)
    assert 1 - in_bf16 / of_67b == pytest.approx(0.822, abs=0.0005)


def test_v2_lite_has_15_7_billion_parameters_and_2_4_active():
    sizes = measure(published("v2_lite"))
    assert round(sizes.total / 1e9, 1) == 15.7
    assert round(sizes.active / 1e9, 2) == 2.45


def test_h200_3b_has_3_4_billion_parameters():
    assert round(measure(published("h200_3b")).total / 1e9, 1) == 3.4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 16, "mtp_depth": 2},
        {"dense_layers": 0, "shared_experts": 0},
        {"dense_layers": 3},
    ],
)
def test_a_built_model_has_as_many_parameters_as_measured(changes):
    model = random_transformer(**changes)
    sizes = measure(replace(CONFIG, **changes))
    built = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert sizes.total + sizes.mtp == built


def test_active_parameters_are_all_but_idle_experts_and_the_embedding():
    every = measure(replace(CONFIG, top_k=CONFIG.experts, groups=1, top_groups=1))
    assert every.total - every.active == CONFIG.vocab_size * CONFIG.dim
    some = measure(CONFIG)
    idle = (CONFIG.experts - CONFIG.top_k) * 3 * CONFIG.dim * CONFIG.expert_hidden
    assert every.active - some.active == CONFIG.moe_layers * idle


@pytest.mark.parametrize(("name", "gflop"), [("v2", 155), ("v3", 250)])
def test_training_work_is_that_of_isca_2025_table_2(name, gflop):
    work = training_work(replace(published(name), mtp_depth=0), 4096)
    assert work.causal / 1e9 == pytest.approx(gflop, rel=0.025)


def test_causal_attention_is_half_of_the_full_work():
    model = published("v3")
    matmuls = 2 * training_work(model, 4096).causal - training_work(model, 4096).full
    assert matmuls == pytest.approx(training_work(model, 0).full)
    longer = training_work(model, 8192)
    assert longer.full - matmuls == pytest.approx(2 * (training_work(model, 4096).full - matmuls))
