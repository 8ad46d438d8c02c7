"""The same run on one device and on every mesh of eight; what is divided, and what is refused."""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.checkpoint import CheckpointStore
from dsjax.config import Mesh, Run
from dsjax.data import TrainStream
from dsjax.parallel import build_mesh, state_shardings
from dsjax.parallel.mesh import EXPERTS, STATE
from dsjax.parallel.sharding import SMALL, divide
from dsjax.train.runtime import Runtime, load_corpus
from dsjax.train.step import TrainState, build_step
from tests.train.conftest import draw_state, make_run, quick_compilation, write_text

__all__ = ["quick_compilation"]

STEPS = 5
MESHES = {
    "1x8": Mesh(1, 8),
    "8x1": Mesh(8, 1),
    "2x4": Mesh(2, 4),
    "experts": Mesh(2, 2, expert=2),
    "hosts, ZeRO-1": Mesh(1, 2, host=2, expert=2, zero=1),
    "experts, ZeRO-2": Mesh(1, 2, expert=4, zero=2),
}
# Several axes at once by default; each mesh takes ten seconds to compile.
PARTS = {"1x8": 8, "8x1": 1, "2x4": 4, "experts": 4, "hosts, ZeRO-1": 8, "experts, ZeRO-2": 8}
DEFAULT = "experts", "hosts, ZeRO-1"
NAMES = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Run:
    run = make_run(write_text(tmp_path_factory.mktemp("corpus") / "words.txt"))
    return replace(run, model=replace(run.model, dense_layers=1))


@pytest.fixture(scope="module")
def drawn(tiny) -> TrainState:
    """A state before the first step, on the host."""
    return draw_state(tiny)


class Ran:
    """A run of a few steps on a mesh."""

    def __init__(self, run: Run, drawn: TrainState, steps: int = STEPS):
        self.runtime = Runtime(run, load_corpus(run))
        state = jax.tree.map(
            lambda leaf, like: jax.device_put(leaf, like.sharding), drawn, self.runtime.abstract
        )
        self.losses = []
        for n in range(steps):
            state, metrics = self.runtime.step(state, self.runtime.stream.batch(n))
            self.losses.append([float(metrics[name]) for name in ("loss", "mtp_loss", "max_vio")])
        self.state = state


@pytest.fixture(scope="module")
def on(tiny, drawn) -> Callable[[str], Ran]:
    """The run on a mesh, by its name; worked out once."""
    return functools.cache(lambda name: Ran(replace(tiny, mesh=MESHES[name]), drawn))


@pytest.fixture(scope="module")
def alone(tiny, drawn) -> tuple[list, TrainState]:
    """Losses and state after the same steps on a single device, without any mesh."""
    return run_alone(tiny, drawn)


def run_alone(run: Run, drawn: TrainState, steps: int = STEPS) -> tuple[list, TrainState]:
    step, state = build_step(run), jax.tree.map(jnp.array, drawn)
    corpus = load_corpus(run)
    stream = TrainStream(corpus.train, run.data.seq_len, run.train, run.data_seed)
    losses = []
    for n in range(steps):
        state, metrics = step(state, stream.batch(n)[None], jnp.int32(1))
        losses.append([float(metrics[name]) for name in ("loss", "mtp_loss", "max_vio")])
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {1}
    return losses, state


@pytest.mark.parametrize("mesh", NAMES)
def test_losses_are_those_of_a_single_device(mesh, on, alone):
    np.testing.assert_allclose(on(mesh).losses, alone[0], rtol=1e-5)
    assert on(mesh).losses[-1][0] < on(mesh).losses[0][0]


@pytest.fixture(scope="module")
def in_fp8(tiny) -> Run:
    widths = {"kv_lora_rank": 32, "qk_nope_dim": 16, "qk_rope_dim": 16, "v_dim": 16}
    return replace(tiny, precision="fp8", model=replace(tiny.model, **widths))


@pytest.mark.slow
def test_fp8_losses_are_near_those_of_a_single_device(in_fp8):
    """Tiles that lie along tokens are other ones on every device, so losses part from the second
    step on and what parts them grows by chance: their means stay nearer than single ones."""
    drawn = draw_state(in_fp8)
    found = Ran(replace(in_fp8, mesh=Mesh(2, 2, expert=2, zero=1)), drawn)
    expected, _ = run_alone(in_fp8, drawn)
    losses, wanted = np.array(found.losses)[:, :2], np.array(expected)[:, :2]
    np.testing.assert_allclose(losses[0], wanted[0], rtol=5e-4)
    np.testing.assert_allclose(losses[:-1], wanted[:-1], rtol=2e-3)
    np.testing.assert_allclose(losses, wanted, rtol=5e-3)
    np.testing.assert_allclose(losses.mean(0), wanted.mean(0), rtol=1e-3)


@pytest.mark.slow
def test_fp8_gradients_are_near_those_of_a_single_device(in_fp8):
    """Of every parameter after a step, by its first moment: within what casts to FP8 round off,
    but for routers, whose choices that can change."""
    drawn = draw_state(in_fp8)
    found = Ran(replace(in_fp8, mesh=Mesh(2, 2, expert=2, zero=1)), drawn, steps=1).state
    _, expected = run_alone(in_fp8, drawn, steps=1)
    moments, wanted = (state.optimizer[1].mu for state in (found, expected))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(moments), jax.tree.leaves(wanted), strict=True
    ):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        allowed = 0.25 if "router" in jax.tree_util.keystr(path) else 0.1
        assert np.linalg.norm(one - other) < allowed * np.linalg.norm(other), path


@pytest.mark.slow
def test_fp8_weights_that_layers_bring_together(in_fp8):
    """ZeRO-3: cast in every layer, to the values that ZeRO-1 casts once a step."""
    run = replace(in_fp8, train=replace(in_fp8.train, remat="v3"))
    one, three = (
        Ran(replace(run, mesh=Mesh(2, 2, expert=2, zero=zero)), draw_state(run)) for zero in (1, 3)
    )
    np.testing.assert_allclose(three.losses[0], one.losses[0], rtol=1e-6)
    np.testing.assert_allclose(
        np.array(three.losses)[:, :2], np.array(one.losses)[:, :2], rtol=1e-3
    )


@pytest.mark.parametrize("mesh", NAMES)
def test_router_biases_are_those_of_a_single_device(mesh, on, alone):
    for left, right in zip(
        jax.tree.leaves(on(mesh).state.bias), jax.tree.leaves(alone[1].bias), strict=True
    ):
        assert np.asarray(left).any()
        np.testing.assert_allclose(left, right, atol=1e-7)


@pytest.mark.parametrize("mesh", NAMES)
def test_parameters_and_moments_are_divided_and_stay_so(mesh, on):
    parts = PARTS[mesh]
    state, divided = on(mesh).state, 0
    moments = next(part for part in state.optimizer if hasattr(part, "mu"))
    for tree in (state.params, moments.mu, moments.nu):
        for leaf in jax.tree.leaves(tree):
            shard = leaf.addressable_shards[0].data.size
            assert shard in (leaf.size, leaf.size // parts)
            divided += shard < leaf.size
            assert shard < leaf.size or leaf.size < 2 * SMALL or parts == 1
    assert divided >= (3 * 5 if parts > 1 else 0)
    # 300 divides by 4 and not by 8.
    shape = {1: (300, 32), 4: (75, 32), 8: (300, 4)}[parts]
    assert state.params["embed"].addressable_shards[0].data.shape == shape


@pytest.mark.parametrize("mesh", NAMES)
def test_every_array_keeps_its_sharding_so_the_step_compiles_once(mesh, on):
    ran = on(mesh)
    for leaf, like in zip(
        jax.tree.leaves(ran.state), jax.tree.leaves(ran.runtime.abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    assert ran.runtime._step._cache_size() == 1


def test_layers_of_a_stack_are_never_divided():
    assert spec((8, 16, 24), "moe", "q") == P(None, None, "fsdp")
    assert spec((64, 16, 9), "dense", "q") == P(None, "fsdp")
    assert spec((64, 16, 9), "mtp", "q") == P("fsdp")


def test_small_and_odd_arrays_are_replicated():
    assert spec((8, 8), "embed") == P()
    assert spec((63, 65), "embed") == P()
    assert spec((64, 64), "embed", fsdp=1) == P()


def test_experts_are_divided_over_their_axes_and_further_over_fsdp():
    sizes = {"fsdp": 2, "host": 2, "expert": 4}
    names = "moe", "mlp", "experts", "gate_up"
    assert spec((5, 16, 32, 64), *names, **sizes) == P(None, EXPERTS, None, "fsdp")
    assert spec((16, 32, 64), "mtp", *names[1:], **sizes) == P(EXPERTS, None, "fsdp")
    assert spec((5, 32, 64), "moe", "attn", "q", **sizes) == P(None, None, STATE)
    with pytest.raises(ValueError, match="12 experts do not divide over mesh host=2, expert=4"):
        spec((5, 12, 32, 64), *names, **sizes)


def spec(shape, *names, fsdp=8, host=1, expert=1):
    return divide(shape, {"data": 1, "fsdp": fsdp, "host": host, "expert": expert}, names).spec


def test_published_model_is_divided_by_layer_contents():
    shape = jax.ShapeDtypeStruct((58, 256, 7168, 4096), jnp.float32)
    tree = {"moe": {"mlp": {"experts": {"gate_up": shape}}}}
    (sharding,) = jax.tree.leaves(state_shardings(tree, build_mesh(Mesh(1, 8))))
    assert sharding.shard_shape(shape.shape) == (58, 256, 7168 // 8, 4096)


@pytest.mark.parametrize("mesh", [Mesh(3, -1), Mesh(2, 2), Mesh(16, -1), Mesh(8, 2)])
def test_mesh_that_does_not_fit_names_its_axes_and_the_devices(mesh):
    with pytest.raises(ValueError, match=rf"data={mesh.data}, fsdp={mesh.fsdp}, .* 8 devices"):
        build_mesh(mesh)


def test_mesh_takes_what_is_left():
    assert tuple(build_mesh(Mesh(2, -1)).shape.values()) == (2, 4, 1, 1)
    assert tuple(build_mesh(Mesh(-1, 2, expert=2)).shape.values()) == (2, 2, 1, 2)
    assert build_mesh(Mesh(), devices=1).size == 1


@pytest.mark.parametrize(("batch", "parts", "micro"), [(12, 1, 12), (16, 4, 4)])
def test_batch_that_does_not_divide_names_the_numbers(tiny, batch, parts, micro):
    run = replace(tiny, train=replace(tiny.train, batch=batch, micro_batches=parts))
    message = rf"micro-batch of {micro} .*batch={batch}, micro_batches={parts}.* 8 devices"
    with pytest.raises(ValueError, match=message):
        Runtime(run, load_corpus(run))


def test_checkpoint_is_restored_onto_another_number_of_experts_a_device(on, tiny, tmp_path):
    saved = on("experts").state
    with CheckpointStore(tmp_path) as store:
        store.save(STEPS, saved._asdict(), {})
        store.wait()
        like = Runtime(replace(tiny, mesh=MESHES["1x8"]), load_corpus(tiny)).abstract
        restored = TrainState(**store.restore(like._asdict()).state)
    for old, new, wanted in zip(*map(jax.tree.leaves, (saved, restored, like)), strict=True):
        assert new.sharding.is_equivalent_to(wanted.sharding, new.ndim)
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert restored.params["embed"].addressable_shards[0].data.shape == (300, 4)
