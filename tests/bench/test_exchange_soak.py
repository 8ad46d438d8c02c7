"""Many rounds of an exchange with changing routings, on CPU devices."""

import jax
import numpy as np
import pytest

from dsjax.bench import exchange_soak
from dsjax.bench.exchange_shapes import Shape
from dsjax.bench.exchange_soak import routing, soak
from tests.bench.test_exchange_bench import SHAPE, cards, layouts, pytestmark
from tests.train.conftest import quick_compilation

__all__ = ["cards", "pytestmark", "quick_compilation"]


def test_routings_are_what_they_are_called():
    shape, key = Shape(4, 20, 128, 16, 4), jax.random.key(0)
    owners = [np.asarray(routing(i, key, key, shape)) // 4 for i in range(4)]
    assert len(np.unique(owners[0])) == 4
    assert len(np.unique(owners[1])) == 1
    assert len(np.unique(owners[2])) == 3
    assert (owners[3] == owners[3][:, :1]).all()
    assert len(np.unique(owners[3])) > 1
    assert all(len(set(row)) == 4 for row in np.asarray(routing(1, key, key, shape)).tolist())


def test_soak_of_right_rows(cards, monkeypatch):
    monkeypatch.setattr(exchange_soak, "LOOP", 4)
    seen = []
    found = soak(6, cards, SHAPE, layouts, "reference", seen.append)
    assert (found.done, found.dispatched, found.combined, found.failed) == (6, 0, 0, False)
    assert len(seen) == 2
    assert str(found).startswith("6 of 6 rounds, 0 wrong rows dispatched, 0 combined")


@pytest.mark.parametrize(
    ("door", "counted"), [("dispatch_quantized", (8, 0)), ("combine_rows", (0, 8))]
)
def test_soak_counts_wrong_rows(door, counted, cards, monkeypatch):
    """One of each device in a round of four, which is the one of a single device: that has rows."""
    right = getattr(exchange_soak, door)

    def other(*operands, **options):
        found = right(*operands, **options)
        if door == "combine_rows":
            return found.at[2].set(found[3])
        return found[0], found[1].at[0].mul(2)

    monkeypatch.setattr(exchange_soak, door, other)
    found = soak(1, cards, SHAPE, layouts, "reference")
    assert (found.dispatched, found.combined) == counted
    assert found.failed


def test_ctrl_c_ends_a_soak_with_what_was_counted(cards, monkeypatch):
    monkeypatch.setattr(exchange_soak, "LOOP", 2)
    calls = []

    def begun(what):
        calls.append(what)
        if len(calls) == 3:
            raise KeyboardInterrupt

    found = soak(8, cards, SHAPE, layouts, "reference", begun)
    assert (found.done, found.interrupted, found.failed) == (4, True, False)
