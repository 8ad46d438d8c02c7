import itertools

import numpy as np
import pytest

from dsjax.config import Train
from dsjax.data.packing import Packed
from dsjax.data.stream import TrainStream, batch_offset, batch_size, eval_batches

SEQ = 4
RECORDS = 24
PACKED = Packed(np.arange(RECORDS * SEQ + 3, dtype=np.uint16), RECORDS * SEQ + 3)
FLAT = Train(steps=20, batch=8)
RAMP = Train(steps=20, batch=16, micro_batches=4, ramp_from=4, ramp_fraction=0.5)


def _stream(train=FLAT, seed=0, **host):
    return TrainStream(PACKED, SEQ, train, seed, **host)


def _records(batches):
    """Numbers of the records in the batches; each must be whole."""
    rows = np.concatenate(list(batches))
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(SEQ + 1))
    return (rows[:, 0] // SEQ).tolist()


@pytest.mark.parametrize("train", [FLAT, RAMP])
def test_reading_ahead_gives_the_same_batches(train):
    stream = _stream(train)
    batches = list(stream.iterate(0, 12))
    assert len(batches) == 12
    for n, batch in enumerate(batches):
        assert batch.shape == (batch_size(train, n), SEQ + 1)
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, stream.batch(n))


def test_a_resumed_stream_goes_on_where_it_stopped():
    whole = list(_stream(RAMP).iterate(0, 12))
    resumed = list(_stream(RAMP).iterate(5, 12))
    assert len(resumed) == 7
    for left, right in zip(whole[5:], resumed, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_micro_batches(hosts):
    streams = [_stream(RAMP, host_index=i, host_count=hosts) for i in range(hosts)]
    for n in (0, 3, 11):
        micro = RAMP.batch // RAMP.micro_batches
        parts = [stream.batch(n).reshape(-1, micro // hosts, SEQ + 1) for stream in streams]
        whole = np.concatenate(parts, axis=1).reshape(-1, SEQ + 1)
        np.testing.assert_array_equal(whole, _stream(RAMP).batch(n))


def test_each_epoch_covers_every_record_once_in_a_new_order():
    epoch = RECORDS // FLAT.batch
    orders = [_records(_stream().iterate(e * epoch, (e + 1) * epoch)) for e in range(3)]
    assert all(sorted(order) == list(range(RECORDS)) for order in orders)
    assert all(left != right for left, right in itertools.combinations(orders, 2))
    assert orders[0] != list(range(RECORDS))


def test_a_ramped_stream_skips_and_repeats_nothing():
    seen = _records(_stream(RAMP).iterate(0, 9))
    for start in range(0, len(seen) - RECORDS + 1, RECORDS):
        assert sorted(seen[start : start + RECORDS]) == list(range(RECORDS))


def test_seeds_give_different_orders():
    assert _records([_stream(seed=0).batch(0)]) != _records([_stream(seed=1).batch(0)])


def test_the_order_is_the_one_of_earlier_releases():
    """A resume must find the order it left: a change here breaks every saved run."""
    assert _records([_stream(seed=0).batch(0)]) == [21, 2, 13, 14, 9, 7, 17, 6]


def test_a_batch_may_exceed_the_corpus():
    order = _records([_stream(Train(batch=2 * RECORDS)).batch(0)])
    assert sorted(order) == sorted(2 * list(range(RECORDS)))


def test_an_abandoned_iterator_and_an_empty_one_are_fine():
    assert next(_stream().iterate(3, 10**9)).shape == (8, SEQ + 1)
    assert list(_stream().iterate(4, 4)) == []


def test_the_ramp_is_linear_in_micro_batches():
    sizes = [batch_size(RAMP, n) for n in range(12)]
    assert sizes == [4, 4, 4, 4, 8, 8, 8, 12, 12, 12, 16, 16]
    assert batch_size(Train(batch=6, micro_batches=3), 0) == 6
    assert batch_size(Train(batch=6, micro_batches=3, ramp_from=2), 0) == 6


@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("start", [None, 3, 12, 21])
def test_offsets_are_the_sums_of_sizes(fraction, start):
    train = Train(steps=97, batch=21, micro_batches=7, ramp_from=start, ramp_fraction=fraction)
    sizes = [batch_size(train, n) for n in range(120)]
    assert sizes == sorted(sizes)
    assert all(size % 3 == 0 and size >= (start or 21) for size in sizes)
    expected = [0, *itertools.accumulate(sizes)]
    assert [batch_offset(train, n) for n in range(121)] == expected
    assert sizes[-1] == 21


@pytest.mark.parametrize("count", [2, 5, 6, 26, 33, 34])
def test_evaluation_reads_every_target_once(count):
    tokens = np.arange(100, 100 + count, dtype=np.uint16)
    targets, inputs = [], []
    for tokens_bt, mask_bt in eval_batches(Packed(tokens, count), SEQ, batch=2):
        assert (tokens_bt.shape, tokens_bt.dtype) == ((2, SEQ + 1), np.int32)
        assert (mask_bt.shape, mask_bt.dtype) == ((2, SEQ), np.float32)
        targets += tokens_bt[:, 1:][mask_bt == 1].tolist()
        inputs += tokens_bt[:, :-1][mask_bt == 1].tolist()
        assert set(mask_bt.ravel().tolist()) <= {0.0, 1.0}
    assert targets == tokens[1:].tolist()
    assert inputs == tokens[:-1].tolist()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"8 sequences.* 3 hosts"):
        _stream(host_count=3)
    with pytest.raises(ValueError, match=r"4 sequences.* 8 hosts"):
        _stream(RAMP, host_count=8)
    with pytest.raises(ValueError, match="host_index=2 of host_count=2"):
        _stream(host_index=2, host_count=2)
    with pytest.raises(ValueError, match="seed is -1"):
        _stream(seed=-1)
    with pytest.raises(ValueError, match="seq_len=100 takes 101 tokens"):
        TrainStream(PACKED, 100, FLAT, 0)
    with pytest.raises(ValueError, match="batches 5 to 4"):
        _stream().iterate(5, 4)
    with pytest.raises(ValueError, match="batch -1"):
        _stream().batch(-1)


def test_evaluation_checks_its_input_at_once():
    with pytest.raises(ValueError, match="batch is 0"):
        eval_batches(PACKED, SEQ, 0)
    with pytest.raises(ValueError, match="has 1 tokens"):
        eval_batches(Packed(np.zeros(1, np.uint16), 1), SEQ, 2)
