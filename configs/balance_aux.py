"""Balancing by the classic auxiliary loss, at the paper's weight of 0.001, without router bias.

    python3 -m uv run run.py compare

trains this beside `balance_bias`: same model, seed and batches (arXiv 2408.15664, section 4.1).
"""

from dataclasses import replace

from configs.tiny import recipe as tiny
from dsjax.config import Run


def recipe() -> Run:
    run = tiny()
    balance = replace(run.balance, bias_speed=0.0, sequence_aux=0.0, batch_aux=0.001)
    return replace(run, name="balance_aux", balance=balance)
