"""A trained model back from a run's folder, for generation and conversion."""

from __future__ import annotations

from pathlib import Path

import jax

from dsjax.checkpoint import CheckpointStore
from dsjax.data import Tokenizer, load_tokenizer
from dsjax.model import Transformer
from dsjax.train.loop import CHECKPOINTS, TOKENIZER
from dsjax.train.notes import from_notes
from dsjax.train.step import TrainState, initial_state, model_of


def load_run(folder: Path, step: int | None = None) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run's newest good checkpoint, or of the one at `step`.

    Raises ValueError when the folder holds no run, CheckpointError when no checkpoint is good.
    """
    if not (folder / CHECKPOINTS).is_dir():
        raise ValueError(
            f"{folder} is neither a run (no {CHECKPOINTS}/ in it) nor a published "
            "checkpoint (no config.json)"
        )
    with CheckpointStore(folder / CHECKPOINTS) as store:
        step, notes = store.read_meta(step)
        run = from_notes(notes["run"])
        like = jax.eval_shape(lambda: initial_state(run))
        state = TrainState(**store.restore(like._asdict(), step).state)
    own = folder / TOKENIZER
    tokenizer = load_tokenizer(str(own) if own.is_file() else run.data.tokenizer)
    return model_of(run, state.params, state.bias), tokenizer
