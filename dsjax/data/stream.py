"""Batches by number: batch n is a pure function of (seed, n).

Nothing is remembered between batches, so a run resumes from its step count alone, and as hosts
take slices of the same micro-batches it may resume on another number of hosts. Grain shuffles,
anew each epoch, and prefetches.
"""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Float32, Int32

from dsjax import config
from dsjax.data.packing import Packed, Sequences


class TrainStream:
    """Training batches of one host, whose sizes follow `train`'s ramp.

    ValueError if the text is shorter than a sequence or a micro-batch does not divide over hosts.
    """

    def __init__(
        self,
        packed: Packed,
        seq_len: int,
        train: config.Train,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
    ) -> None:
        _check_hosts(train, host_index, host_count)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}: it must lie between 0 and 2**32 - 1")
        self._train, self._host, self._hosts = train, host_index, host_count
        records = grain.MapDataset.source(Sequences(packed, seq_len))
        self._records = records.seed(seed).shuffle().repeat()

    def batch(self, n: int) -> Int32[np.ndarray, "b t+1"]:
        """This host's rows of batch n, its share of each micro-batch; ValueError if n < 0."""
        size, first = batch_size(self._train, n), batch_offset(self._train, n)
        micro, *_ = _ramp(self._train)
        share = micro // self._hosts
        starts = range(first + self._host * share, first + size, micro)
        rows = [i for start in starts for i in range(start, start + share)]
        return np.stack([np.asarray(self._records[i]) for i in rows])

    def iterate(self, start: int, stop: int) -> Iterator[Int32[np.ndarray, "b t+1"]]:
        """Batches start, ..., stop - 1 in order, read ahead by two threads."""
        if not 0 <= start <= stop:
            raise ValueError(f"batches {start} to {stop}: start must lie between 0 and stop")
        if start == stop:
            return iter(())
        steps = grain.MapDataset.range(start, stop).map(self.batch)
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(steps.to_iter_dataset(ahead))


def batch_size(train: config.Train, n: int) -> int:
    """Sequences in global batch n: the ramp in whole micro-batches, then `train.batch`."""
    _check_step(n)
    micro, first, levels, ramp = _ramp(train)
    return train.batch if n >= ramp else micro * (first + levels * n // ramp)


def batch_offset(train: config.Train, n: int) -> int:
    """Sequences before global batch n, counted from the start of training."""
    _check_step(n)
    micro, first, levels, ramp = _ramp(train)
    inside = min(n, ramp)
    # The ramp climbs to level k at step ceil(k * ramp / levels): count the steps on or above it.
    climbs = (-(-k * ramp // levels) for k in range(1, levels + 1))
    above = sum(max(0, inside - climb) for climb in climbs)
    return micro * (first * inside + above) + train.batch * (n - inside)


def eval_batches(
    packed: Packed, seq_len: int, batch: int
) -> Iterator[tuple[Int32[np.ndarray, "b t+1"], Float32[np.ndarray, "b t"]]]:
    """The tokens once, in order, with a mask of 1 on each target and 0 on padding.

    Every token but the first, which nothing precedes, is a target exactly once. ValueError if
    there are fewer than two tokens.
    """
    if seq_len < 1 or batch < 1:
        raise ValueError(f"seq_len is {seq_len} and batch is {batch}: both must be at least 1")
    if len(packed.tokens) < 2:
        raise ValueError(f"the corpus has {len(packed.tokens)} tokens: evaluation needs 2 or more")
    targets = len(packed.tokens) - 1
    return (_eval_rows(packed, seq_len, r, batch) for r in range(0, -(-targets // seq_len), batch))


def _eval_rows(
    packed: Packed, seq_len: int, first_row: int, batch: int
) -> tuple[Int32[np.ndarray, "b t+1"], Float32[np.ndarray, "b t"]]:
    last = len(packed.tokens) - 1
    rows = first_row + np.arange(batch)
    at_bt = rows[:, None] * seq_len + np.arange(seq_len + 1)
    tokens_bt = packed.tokens[np.minimum(at_bt, last)].astype(np.int32)
    return tokens_bt, (at_bt[:, 1:] <= last).astype(np.float32)


def _ramp(train: config.Train) -> tuple[int, int, int, int]:
    """Micro-batch size, micro-batches at first, how many more at last, steps in between."""
    micro = train.batch // train.micro_batches
    first = train.micro_batches if train.ramp_from is None else train.ramp_from // micro
    return micro, first, train.micro_batches - first, round(train.ramp_fraction * train.steps)


def _check_step(n: int) -> None:
    if n < 0:
        raise ValueError(f"batch {n}: batches count from 0")


def _check_hosts(train: config.Train, host_index: int, host_count: int) -> None:
    if host_count < 1 or not 0 <= host_index < host_count:
        raise ValueError(
            f"host_index={host_index} of host_count={host_count}: the index counts from 0"
        )
    micro, *_ = _ramp(train)
    if micro % host_count:
        raise ValueError(
            f"a micro-batch has {micro} sequences, which {host_count} hosts cannot share evenly: "
            f"make it a multiple of {host_count}"
        )
