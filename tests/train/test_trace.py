"""A profile becomes operations whose times add up, whatever overlaps."""

import pytest
from jax.profiler import ProfileData

from dsjax.train import kinds
from dsjax.train.hlo import op_names
from dsjax.train.trace import Event, own_seconds, read, timeline

HLO = """HloModule jit_step, is_scheduled=true

%fused_computation.1 (param_0.1: f32[4,4], param_1.1: f32[4,4]) -> f32[4,4] {
  %param_0.1 = f32[4,4]{1,0} parameter(0)
  %param_1.1 = f32[4,4]{1,0} parameter(1)
  %dot.2 = f32[4,4]{1,0} dot(%param_0.1, %param_1.1), metadata={op_name="jit(step)/jvp(head)/d,dp->p/dot_general"}
  ROOT %mul.1 = f32[4,4]{1,0} multiply(%dot.2, %dot.2), metadata={op_name="jit(step)/mul"}
}

%fused_computation.2 (param_0.2: f32[4,4]) -> f32[4,4] {
  %param_0.2 = f32[4,4]{1,0} parameter(0)
  ROOT %add.1 = f32[4,4]{1,0} add(%param_0.2, %param_0.2), metadata={op_name="jit(step)/jvp(mtp)/add"}
}

%fused_computation.3 (param_0.3: f32[4,4]) -> f32[4,4] {
  %param_0.3 = f32[4,4]{1,0} parameter(0)
  ROOT %dot.3 = f32[4,4]{1,0} dot(%param_0.3, %param_0.3), metadata={stack_frame_id=3}
}

ENTRY %main.9 (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0), metadata={op_name="state.params"}
  %ynn_fusion.1 = f32[4,4]{1,0} fusion(%a, %a), kind=kCustom, calls=%fused_computation.1, metadata={op_name="jit(step)/mul"}
  %fusion.3 = f32[4,4]{1,0} fusion(%a), kind=kCustom, calls=%fused_computation.3
  ROOT %loop_add_fusion.2 = f32[4,4]{1,0} fusion(%ynn_fusion.1), kind=kLoop, calls=%fused_computation.2
}
"""  # noqa: E501
GPU = """
planes {{
  name: "/device:GPU:{device}"
  lines {{
    name: "Stream #13(Compute)"
    events {{ metadata_id: 1 offset_ps: 0 duration_ps: 4000000
              stats {{ metadata_id: 1 str_value: "custom-call.4" }}
              stats {{ metadata_id: 2
                       str_value: "jit(step)/jvp()/mla_query/btd,dhq->bthq/dot_general:" }} }}
    events {{ metadata_id: 2 offset_ps: 4000000 duration_ps: 1000000 }}
    events {{ metadata_id: 2 offset_ps: 6000000 duration_ps: 1000000
              stats {{ metadata_id: 1 str_value: "while.1::loop_add_fusion.2" }} }}
  }}
  lines {{
    name: "Stream #14(MemcpyD2D)"
    events {{ metadata_id: 3 offset_ps: 7000000 duration_ps: 2000000
              stats {{ metadata_id: 3
                       str_value: "kind_src:device kind_dst:device size:4096 dest:0 async:1" }} }}
  }}
  lines {{
    name: "XLA Ops"
    events {{ metadata_id: 2 offset_ps: 0 duration_ps: 9000000 }}
  }}
  event_metadata {{ key: 1 value {{ id: 1 name: "nvjet_sm90_tst_128x160" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "loop_add_fusion_2" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "MemcpyD2D" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "tf_op" }} }}
  stat_metadata {{ key: 3 value {{ id: 3 name: "memcpy_details" }} }}
}}
"""
CPU = """
planes {
  name: "/host:CPU"
  lines {
    name: "tf_XLAEigen/1"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000
             stats { metadata_id: 1 str_value: "ynn_fusion.1" }
             stats { metadata_id: 2 str_value: "jit_step" } }
    events { metadata_id: 1 offset_ps: 5000000 duration_ps: 3000000
             stats { metadata_id: 1 str_value: "ynn_fusion.1" }
             stats { metadata_id: 2 str_value: "jit_other" } }
    events { metadata_id: 2 offset_ps: 9000000 duration_ps: 3000000 }
  }
  event_metadata { key: 1 value { id: 1 name: "ynn_fusion.1" } }
  event_metadata { key: 2 value { id: 2 name: "ThunkExecutor::Execute" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
}
"""


def profile(text: str) -> ProfileData:
    return ProfileData.from_text_proto(text)


def test_time_goes_to_what_began_last():
    nested = [Event(0, 100, "while"), Event(10, 40, "a"), Event(50, 90, "b"), Event(60, 70, "c")]
    assert own_seconds(nested) == pytest.approx([30e-9, 30e-9, 30e-9, 10e-9])
    overlapping = [Event(0, 50, "a"), Event(30, 80, "b"), Event(30, 60, "c")]
    assert own_seconds(overlapping) == pytest.approx([30e-9, 20e-9, 30e-9])
    assert own_seconds([Event(5, 5, "nothing"), Event(0, 9, "a")]) == pytest.approx([0, 9e-9])
    assert own_seconds([]) == []


def test_op_names_are_found_inside_fusions():
    found = op_names(HLO)
    assert found["ynn_fusion.1"] == "jit(step)/jvp(head)/d,dp->p/dot_general"
    assert found["loop_add_fusion.2"] == "jit(step)/jvp(mtp)/add"
    assert found["fusion.3"] == "dot"
    assert found["a"] == "state.params"


def test_streams_of_a_gpu_are_read_with_scopes_and_bytes():
    ((matmul, bare, looped, copied),) = read(profile(GPU.format(device=0)), HLO)
    assert matmul.op_name == "jit(step)/jvp()/mla_query/btd,dhq->bthq/dot_general"
    assert matmul.end - matmul.start == 4000
    assert bare.op_name == looped.op_name == "jit(step)/jvp(mtp)/add"
    assert (matmul.bytes, copied.bytes) == (None, 4096)


def test_times_are_means_over_steps_and_devices():
    both = profile(GPU.format(device=0) + GPU.format(device=1))
    found = timeline(list(read(both, HLO)), steps=2)
    assert found.devices == 2
    assert found.seconds == pytest.approx(4.5e-6)
    assert found.busy == pytest.approx(4e-6)
    names = [(each.name, each.kind, each.scope, each.calls) for each in found.operations]
    assert names == [
        ("nvjet_sm90_tst_128x160", kinds.DENSE, "mla_query", 0.5),
        ("loop_add_fusion", kinds.ELEMENTWISE, "mtp", 1.0),
        ("MemcpyD2D", kinds.COPY, "", 0.5),
    ]
    assert [each.bytes for each in found.operations] == [None, None, 2048]
    assert [each.seconds for each in found.operations] == pytest.approx([2e-6, 1e-6, 1e-6])


def test_without_a_gpu_the_instructions_of_the_step_count():
    found = timeline(list(read(profile(CPU), HLO)), steps=1)
    (operation,) = found.operations
    assert (operation.name, operation.kind, operation.calls) == ("ynn_fusion", kinds.HEAD, 1)
    assert found.seconds == found.busy == pytest.approx(3e-6)


def test_a_profile_without_operations_is_empty():
    assert list(read(profile('planes { name: "/host:metadata" }'), HLO)) == []
    empty = timeline([], steps=3)
    assert (empty.seconds, empty.operations, empty.busy) == (0.0, [], 0)
