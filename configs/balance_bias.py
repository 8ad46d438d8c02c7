"""Auxiliary-loss-free balancing: the tiny model steered by its router bias alone.

    python3 -m uv run run.py compare

trains this and its twins `balance_aux*` on the same batches and draws held-out loss against
MaxVio_global (arXiv 2408.15664, table 2). Figures are in docs/benchmarks.md.
"""

from dataclasses import replace

from configs.tiny import recipe as tiny
from dsjax.config import Run


def recipe() -> Run:
    run = tiny()
    balance = replace(run.balance, sequence_aux=0.0, batch_aux=0.0)
    return replace(run, name="balance_bias", balance=balance)
