"""The independent oracle agrees with the golden logits, and dsjax with the oracle everywhere."""

import json

import numpy as np
import pytest

from dsjax.config import Yarn
from dsjax.hf import save_pretrained
from dsjax.hf.folder import Folder
from tests.oracle import logits

TOLERANCE = 2e-5
V2 = {"gate": "softmax", "norm_topk": False, "route_scale": 1.0}
CASES = {
    "v3": {},
    "v3 other groups": {"experts": 12, "groups": 3, "top_groups": 1, "top_k": 2},
    "v3 one group, no yarn": {"groups": 1, "top_groups": 1, "yarn": None},
    "no dense layers, no shared experts": {"dense_layers": 0, "shared_experts": 0, "layers": 2},
    "all dense": {"dense_layers": 2, "layers": 2, "v_dim": 8, "qk_nope_dim": 16},
    "v2 greedy, no q-LoRA": V2
    | {"selection": "greedy", "q_lora_rank": None, "yarn": Yarn(4.0, 64, 32, 1, 0.707, 0.707)},
    "v2 groups": V2
    | {"selection": "group_limited_greedy", "route_scale": 16.0, "shared_experts": 2},
    "v2 normalised, mscales differ": V2
    | {"selection": "greedy", "norm_topk": True, "yarn": Yarn(40.0, 16, 16, 2, 1.0, 0.5)},
    "mscale of all dimensions unset": {"yarn": Yarn(2.5, 48, 8, 1, 0.7, 0.0), "rope_theta": 500.0},
}


@pytest.mark.parametrize("name", ["v2_tiny", "v3_tiny", "v3_tiny_fp8"])
def test_oracle_matches_golden(golden, name):
    config = json.loads((golden / name / "config.json").read_text())
    expected = np.load(golden / name / "golden.npz", allow_pickle=False)
    found = logits(dict(Folder(golden / name)), config, expected["ids"][:1])
    difference = np.abs(found - expected["logits"][:1]).max()
    assert difference <= TOLERANCE * np.abs(expected["logits"]).max()


@pytest.mark.parametrize("case", CASES)
def test_model_matches_oracle(case, random_model, tokens, tmp_path):
    model = random_model(seed=len(case), **CASES[case])
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = logits(dict(Folder(tmp_path)), config, np.asarray(tokens))
    difference = np.abs(np.asarray(model(tokens)) - expected).max()
    assert difference <= TOLERANCE * np.abs(expected).max()
