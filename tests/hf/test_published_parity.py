"""Logits equal those of Hugging Face transformers on published-format checkpoints."""

import numpy as np
import pytest

from dsjax.hf import from_pretrained

TOLERANCE = 2e-5


@pytest.mark.parametrize("name", ["v2_tiny", "v3_tiny", "v3_tiny_fp8"])
def test_logits_and_greedy_text_match(golden, name):
    """Both in one forward pass: the greedy text is the argmax at each of its own positions."""
    expected = np.load(golden / name / "golden.npz", allow_pickle=False)
    ids, prompt, greedy = expected["ids"], expected["prompt"], expected["greedy"]
    text = np.zeros((1, ids.shape[1]), ids.dtype)
    end = prompt.shape[1] + greedy.shape[1]
    text[:, :end] = np.concatenate([prompt, greedy], axis=1)
    model = from_pretrained(golden / name, "float32")
    found = np.asarray(model(np.concatenate([ids, text])))
    difference = np.abs(found[:2] - expected["logits"]).max()
    assert difference <= TOLERANCE * np.abs(expected["logits"]).max()
    np.testing.assert_array_equal(found[2:, prompt.shape[1] - 1 : end - 1].argmax(axis=-1), greedy)
