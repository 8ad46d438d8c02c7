"""Bytes by what they are for: of the tiny model by hand, of a plan by arithmetic."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsjax.parallel import build_mesh, state_shardings
from dsjax.train import memory, runtime
from dsjax.train.memory import bytes_of, measure_memory, readable
from dsjax.train.runtime import Runtime, load_corpus
from dsjax.train.step import initial_state

BLOCK = (
    2 * 32  # norms
    + 32 * 2 * 12 + 32 * 20 + 16 + 16 * 2 * 16 + 2 * 8 * 32  # attention
    + 32 * 4 + 4 * 3 * 32 * 16 + 3 * 32 * 16  # router, routed and shared experts
)  # fmt: skip
PARAMETERS = 2 * 300 * 32 + 32 + 2 * BLOCK + (3 * 32 + 2 * 32 * 32 + BLOCK)
"""Embedding, head and norm; two layers; MTP."""
PLAN = SimpleNamespace(
    temp_size_in_bytes=10**6, output_size_in_bytes=5100, alias_size_in_bytes=5000,
    generated_code_size_in_bytes=7,
)  # fmt: skip


def planned(state, plan=PLAN, batch=()):
    compiled = SimpleNamespace(memory_analysis=lambda: plan)
    return measure_memory(state, batch, compiled)


@pytest.fixture
def state(tiny_run):
    return jax.eval_shape(lambda: initial_state(tiny_run()))


@pytest.mark.usefixtures("on_one_device")
def test_a_compiled_step_has_the_bytes_counted_by_hand(tiny_run):
    run = tiny_run()
    ready = Runtime(run, load_corpus(run))
    shown = ready.stream.batch(0)
    compiled = ready.compile_step(shown)
    found = measure_memory(ready.abstract, ready.put(shown), compiled)
    assert found.parameters == found.gradients == 4 * PARAMETERS
    assert found.moments == 8 * PARAMETERS
    counts, biases = 3 * 4, 3 * 4 * 4  # step, Adam's, schedule's; 3 layers of 4 experts
    assert found.other_state == counts + biases
    assert found.batch == 8 * 33 * 4 + 4
    plan = compiled.memory_analysis()
    given = found.parameters + found.moments + found.other_state + found.batch
    assert given - 4 == plan.argument_size_in_bytes  # the count of one micro-batch is not read
    assert found.gradients + found.workspace == plan.temp_size_in_bytes
    assert 0 < found.results < 10_000
    assert found.planned == given + plan.temp_size_in_bytes + found.results + found.code


def test_bf16_moments_are_half_as_large(tiny_run):
    run = tiny_run(optimizer={"moment_dtype": "bfloat16"})
    found = planned(jax.eval_shape(lambda: initial_state(run)))
    assert found.moments == 4 * PARAMETERS
    assert found.parameters == 4 * PARAMETERS


def test_the_plan_is_split_into_gradients_and_the_rest(state):
    found = planned(state)
    assert found.workspace == 10**6 - 4 * PARAMETERS
    assert (found.results, found.code) == (100, 7)
    assert found.planned == sum(vars(found)[name] for name in (
        "parameters", "moments", "other_state", "batch", "gradients", "workspace", "results",
        "code",
    ))  # fmt: skip


def test_a_platform_that_tells_nothing_leaves_blanks(state, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda: None)
    found = planned(state, plan=None)
    blank = {what for what, count, _ in found.rows() if count is None}
    assert blank == {
        "activations and workspace", "results", "program", "all of these", "peak in use",
    }  # fmt: skip


def test_the_peak_is_the_platforms(state, monkeypatch):
    monkeypatch.setattr(memory, "peak_memory_bytes", lambda: 12345)
    assert planned(state).rows()[-1] == ("peak in use", 12345, "measured")


def test_bytes_are_those_of_one_device(state, tiny_run):
    mesh = build_mesh(tiny_run().mesh)
    assert mesh.size == 8
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state, state_shardings(state, mesh),
    )  # fmt: skip
    divided = bytes_of({"embed": shapes.params["embed"]})
    assert divided == 4 * 300 * 32 // 8
    assert planned(shapes).parameters < planned(state).parameters
    array = jax.device_put(jnp.zeros((16, 4)), runtime.batch_sharding(mesh))
    assert bytes_of(array) == 2 * 4 * 4


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 << 19, "1.5 MiB"), (94 << 30, "94 GiB")],
)
def test_readable(count, text):
    assert readable(count) == text
