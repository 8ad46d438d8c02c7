"""Training: loss, optimizer, schedules, load balance, the loop and its figures."""

from dsjax.train.loop import CHECKPOINTS, Outcome, train, xz_bits_per_byte
from dsjax.train.metrics import Diverged
from dsjax.train.step import TrainState, build_step, initial_state, model_of

__all__ = [
    "CHECKPOINTS",
    "Diverged",
    "Outcome",
    "TrainState",
    "build_step",
    "initial_state",
    "model_of",
    "train",
    "xz_bits_per_byte",
]
