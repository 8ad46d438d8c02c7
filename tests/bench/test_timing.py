"""Sustained timing: what counts as the device's work; peers are timed alike and in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from dsjax.bench import timing
from dsjax.bench.timing import Method, NoTimeline, Program, by_timeline, device_work, union_length

QUICK = Method(warm=0.0, stretch=1e-4, stretches=3, passes=2, on_card=False)
PROFILE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "kernel" } }
  lines {
    name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 5000 }
    events { metadata_id: 1 offset_ps: 4000 duration_ps: 5000 }
  }
  lines {
    name: "Stream #14(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 20000 duration_ps: 1000 }
  }
  lines {
    name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 90000 }
  }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "dispatch" } }
  lines {
    name: "Stream of thoughts"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 90000 }
  }
}
"""


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(2, 5)], 3),
        ([(0, 1), (3, 5)], 3),
        ([(3, 5), (0, 1)], 3),
        ([(0, 4), (3, 5)], 5),
        ([(0, 10), (2, 3), (4, 11)], 11),
        ([(0, 2), (2, 3)], 3),
        ([(1, 2), (1, 2), (1, 2)], 1),
        ([(5, 5)], 0),
    ],
)
def test_union_of_intervals(intervals, length):
    assert union_length(intervals) == length


def test_only_streams_of_gpus_count():
    work = device_work(ProfileData.from_text_proto(PROFILE))
    assert sorted(work) == [(1000, 1005), (1004, 1009), (1020, 1021)]
    assert union_length(work) == 10


def test_profile_without_kernels_is_no_timeline(monkeypatch):
    monkeypatch.setattr(timing, "device_work", lambda profile: [])
    with pytest.raises(NoTimeline, match="0 kernels"):
        by_timeline(Program(jnp.negative, [jnp.ones(8)]), QUICK)


def test_program_calls_every_set_and_traces_once():
    traced = []

    def twice(x):
        traced.append(x.shape)
        return 2 * x

    program = Program(twice, [jnp.full(3, i) for i in range(4)])
    np.testing.assert_array_equal(np.stack(program.outputs())[:, 0], [0, 2, 4, 6])
    assert traced == [(3,)]
    assert program.run(0.0)[1] == 4


def test_other_arrays_take_the_same_compiled_program():
    first = Program(lambda scale, x: scale * x, [jnp.ones(3)] * 2, (2.0,))
    other = first.on([5 * jnp.ones(3)] * 2, (3.0,))
    assert float(first.outputs()[1][0]) == 2
    assert float(other.outputs()[1][0]) == 15
    assert other._program._cache_size() == 1
    assert first._sets[0][0] == 1


def test_stretch_lasts_as_long_as_asked(monkeypatch):
    program = Program(jnp.negative, [jnp.ones(8)] * 2)
    ran = []
    run = program.run
    monkeypatch.setattr(program, "run", lambda seconds: ran.append(run(seconds)) or ran[-1])
    each = program.stretch(0.01)
    elapsed, calls = ran[-1]
    assert elapsed >= 0.01
    assert each == elapsed / calls


def programs() -> dict[str, Program]:
    return {name: Program(jnp.negative, [jnp.ones(8)] * 2) for name in ("peer", "ours")}


def test_peers_are_timed_in_turn(monkeypatch):
    order, timed = [], programs()
    names = {id(program): name for name, program in timed.items()}
    readings = iter([3.0, 30.0, 1.0, 10.0, 2.0, 20.0])

    def read(program, method):
        order.append(names[id(program)])
        return next(readings)

    monkeypatch.setattr(timing, "by_wall", read)
    method = Method(warm=0.0, passes=3, on_card=False)
    found = timing.interleaved(timed, method)
    assert order == ["peer", "ours"] * 3
    assert (found["peer"].seconds, found["ours"].seconds) == (2.0, 20.0)
    assert found["ours"].passes == (30.0, 10.0, 20.0)


@pytest.mark.parametrize(("short_call", "how"), [(1e3, "timeline"), (0.0, "wall")])
def test_short_calls_are_read_off_a_timeline(monkeypatch, short_call, how):
    monkeypatch.setattr(timing, "by_timeline", lambda program, method: 1.0)
    method = Method(warm=0.0, stretch=1e-4, passes=1, short_call=short_call)
    found = timing.interleaved(programs(), method)
    assert {timing.how for timing in found.values()} == {how}


def test_without_a_timeline_all_are_timed_by_the_wall(monkeypatch):
    monkeypatch.setattr(timing, "device_work", lambda profile: [])
    method = Method(warm=0.0, stretch=1e-4, stretches=1, passes=1, short_call=1e3)
    found = timing.interleaved(programs(), method)
    assert {timing.how for timing in found.values()} == {"wall"}
    assert all(timing.seconds > 0 for timing in found.values())


def test_method_of_a_cpu():
    if jax.default_backend() == "cpu":
        assert Method.for_device(0.7).stretch == pytest.approx(0.1)
        assert not Method.for_device(0.7).on_card
