"""What a run needs before its first step: data, mesh, compiled functions, state."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Run
from dsjax.data import Packed, Tokenizer, TrainStream, load_corpus_tokens
from dsjax.parallel import (
    ALONE,
    Alone,
    Meshed,
    batch_sharding,
    build_mesh,
    choose_exchange,
    state_shardings,
)
from dsjax.train.evaluate import build_evaluate
from dsjax.train.step import TrainState, build_step, initial_state


@dataclass(frozen=True)
class Corpus:
    """The run's text as tokens."""

    train: Packed
    held_out: Packed
    tokenizer: Tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the training tokens: a resumed run must read the same ones."""
        return hashlib.sha256(np.ascontiguousarray(self.train.tokens)).hexdigest()


def load_corpus(run: Run) -> Corpus:
    """Read and encode the run's text; ValueError if the model cannot take the tokenizer's ids."""
    train, held_out, tokenizer = load_corpus_tokens(run.data, run.data_seed)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"the tokenizer {run.data.tokenizer!r} has {tokenizer.vocab_size} tokens and the model "
            f"only vocab_size={run.model.vocab_size}: set --model.vocab-size to at least that"
        )
    return Corpus(train, held_out, tokenizer)


class Runtime:
    """A run on its mesh: `initial`, `step`, `evaluate` and batches, all ready to call."""

    def __init__(self, run: Run, corpus: Corpus):
        self.run, self.corpus = run, corpus
        self.mesh = build_mesh(run.mesh)
        self._check_batch()
        self._check_precision()
        self.abstract = self._with_shardings(jax.eval_shape(lambda: initial_state(run)))
        devices = self._devices()
        self._step = build_step(run, devices)
        self.evaluate = build_evaluate(run, corpus.held_out, self._put_sequences, devices)
        self.stream = TrainStream(
            corpus.train, run.data.seq_len, run.train, run.data_seed,
            jax.process_index(), jax.process_count(),
        )  # fmt: skip

    def initial(self) -> TrainState:
        """Fresh state, drawn directly into its place on the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        return jax.jit(lambda: initial_state(self.run), out_shardings=shardings)()

    def step(self, state: TrainState, batch: np.ndarray) -> tuple[TrainState, dict[str, Any]]:
        """One step on this host's sequences [b, t + 1]; returns at once, with device arrays."""
        return self._step(state, *self.put(batch))

    def compile_step(self, batch: np.ndarray) -> jax.stages.Compiled:
        """The step for batches like this one, compiled: takes a state, which it uses up, and
        what `put` returns.
        """
        step = cast(jax.stages.Wrapped, self._step)
        return step.lower(self.abstract, *self.put(batch)).compile()

    def put(self, batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """This host's sequences [b, t + 1] in micro-batches on the devices, and how many count."""
        train = self.run.train
        micro = train.batch // train.micro_batches // jax.process_count()
        parts = batch.reshape(-1, micro, batch.shape[-1])
        padded = np.zeros((train.micro_batches, *parts.shape[1:]), parts.dtype)
        padded[: len(parts)] = parts
        sequences = batch_sharding(self.mesh)
        spec = jax.sharding.PartitionSpec(None, *sequences.spec)
        sharding = jax.sharding.NamedSharding(self.mesh, spec)
        array = jax.make_array_from_process_local_data(sharding, padded)
        return array, jnp.int32(len(parts))

    def _put_sequences(self, rows: np.ndarray) -> jax.Array:
        hosts, host = jax.process_count(), jax.process_index()
        share = len(rows) // hosts
        mine = rows[host * share : (host + 1) * share]
        return jax.make_array_from_process_local_data(batch_sharding(self.mesh), mine)

    def _check_batch(self) -> None:
        micro = self.run.train.batch // self.run.train.micro_batches
        if micro % self.mesh.size:
            raise ValueError(
                f"a micro-batch of {micro} sequences (batch={self.run.train.batch}, micro_batches="
                f"{self.run.train.micro_batches}) does not divide over {self.mesh.size} devices"
            )

    def _check_precision(self) -> None:
        apart = self.mesh.size > 1 and self.run.mesh.zero == 3
        if self.run.precision == "fp8" and apart and self.run.train.remat == "none":
            raise ValueError(
                f"precision is fp8 on {self.mesh.size} devices with mesh zero=3 and remat none: "
                "layers would keep all weights that they cast; use remat v3 or layer, or zero=1 "
                "or 2"
            )

    def _devices(self) -> Alone:
        if self.mesh.size == 1:
            return ALONE
        exchange = choose_exchange(self.run.exchange, self.mesh)
        return Meshed(self.mesh, self.abstract.params, exchange, self.run.mesh.zero)

    def _with_shardings(self, abstract: TrainState) -> TrainState:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract, state_shardings(abstract, self.mesh),
        )  # fmt: skip
