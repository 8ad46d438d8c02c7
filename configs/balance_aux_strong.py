"""Balancing by the classic auxiliary loss, ten times the paper's weight: 0.01, no router bias.

    python3 -m uv run run.py compare

trains this beside `balance_bias` and `balance_aux`: same model, seed and batches.
"""

from dataclasses import replace

from configs.tiny import recipe as tiny
from dsjax.config import Run


def recipe() -> Run:
    run = tiny()
    balance = replace(run.balance, bias_speed=0.0, sequence_aux=0.0, batch_aux=0.01)
    return replace(run, name="balance_aux_strong", balance=balance)
