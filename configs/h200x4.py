"""`h200_3b` on the four H200 of a host: experts spread over them, batch 32 x 4096, FP8.

    python3 -m uv run --extra gpu run.py train configs/h200x4.py

Every card has 16 of the 64 experts and a quarter of all masters and moments; tokens cross to their
experts over NVLink. It has not run on four cards yet.
"""

from dataclasses import replace

from configs.h200_3b import recipe as one_card
from dsjax.config import Exchange, Mesh, Run

CARDS = 4


def recipe() -> Run:
    run = one_card()
    return replace(
        run,
        name="h200x4",
        train=replace(run.train, batch=CARDS * run.train.batch),
        mesh=Mesh(fsdp=1, expert=CARDS, zero=1),
        exchange=Exchange(room=2.0),
    )
