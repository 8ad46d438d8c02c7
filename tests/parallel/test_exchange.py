"""A layer's routed experts spread over devices equal those of one, whatever the routing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.config import Exchange, Mesh
from dsjax.model import routed_experts
from dsjax.model.router import select_experts
from dsjax.parallel import build_mesh, choose_exchange
from dsjax.parallel.exchange import SpreadBy
from dsjax.parallel.nvlink import NvLink
from dsjax.parallel.transports import Ragged
from pallas_kernels import quantize_weight
from pallas_kernels.fp8_experts import fp8_experts
from pallas_kernels.fp8_gauge import new_gauge
from pallas_kernels.fp8_weight import Fp8Weight
from pallas_kernels.token_order import HERE
from tests.tiny import CONFIG

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs eight devices")

T, E, K, D, F = 6, 16, 3, 32, 16
"""Tokens of a device, experts of all, ..."""
MESHES = {
    "2": Mesh(fsdp=-1, expert=2),
    "4": Mesh(data=2, fsdp=1, expert=4),
    "8": Mesh(fsdp=1, expert=8),
    "2 hosts of 4": Mesh(fsdp=1, host=2, expert=4),
    "4 hosts of 2": Mesh(fsdp=1, host=4, expert=2),
    "2 hosts of 1": Mesh(fsdp=-1, host=2),
}


def random(generator, count):
    return np.stack([generator.permutation(E)[:K] for _ in range(count)])


def all_to_one(generator, count):
    """Every token to the same experts, of one device where there are few."""
    return np.tile(np.array([5, 4, 6])[:K], (count, 1))


def duplicates(generator, count):
    """Neighbouring experts, which share a device: a token needs it once and uses it K times."""
    first = generator.integers(0, E // 4, count) * 4
    return first[:, None] + np.argsort(generator.random((count, 4)))[:, :K]


def empty_ranks(generator, count):
    """The last quarter of the experts alone."""
    return E - 4 + np.argsort(generator.random((count, 4)))[:, :K]


ROUTINGS = {
    "random": random,
    "all to one": all_to_one,
    "empty ranks": empty_ranks,
    "duplicates": duplicates,
}


def draw(routing, devices=8, seed=0, d=D, f=F):
    generator = np.random.default_rng(seed)
    tokens = devices * T
    x, pull = generator.standard_normal((2, tokens, d), np.float32)
    weights = generator.random((tokens, K), np.float32) + 0.1
    gate_up = 0.3 * generator.standard_normal((E, d, 2 * f), np.float32)
    down = 0.3 * generator.standard_normal((E, f, d), np.float32)
    chosen = ROUTINGS[routing](generator, tokens).astype(np.int32)
    return x, chosen, weights, gate_up, down, pull


def with_gradients(layer):
    def run(x, chosen, weights, gate_up, down, pull):
        def loss(x, weights, gate_up, down):
            out = layer(x, chosen, weights, gate_up, down)
            return (out * pull).sum(), out

        grads, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, weights, gate_up, down)
        return out, *grads

    return run


def spread(mesh, exchange, layer=routed_experts):
    """The layer with its gradients over a mesh, in the form of one device's."""
    tokens, experts = P(mesh.axis_names), P(("host", "expert"))
    run = with_gradients(functools.partial(layer, exchange=exchange))

    def complete(*operands):
        out, dx, dw, *of_experts = run(*operands)
        return out, dx, dw, *jax.lax.psum(of_experts, ("data", "fsdp"))

    return jax.jit(
        jax.shard_map(
            complete,
            mesh=mesh,
            check_vma=False,
            in_specs=(tokens, tokens, tokens, experts, experts, tokens),
            out_specs=(tokens, tokens, tokens, experts, experts),
        )
    )


def assert_equal_layers(found, expected, tolerance):
    for name, one, other in zip(("out", "dx", "dw", "dgu", "dd"), found, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, atol=tolerance * scale, rtol=0, err_msg=name)


@functools.cache
def alone(routing):
    return jax.jit(with_gradients(routed_experts))(*draw(routing))


@functools.cache
def on(mesh, **wanted):
    built = build_mesh(MESHES[mesh])
    return spread(built, choose_exchange(Exchange(**wanted), built))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("mesh", MESHES)
def test_values_and_gradients_are_those_of_one_device(mesh, routing):
    assert_equal_layers(on(mesh)(*draw(routing)), alone(routing), 2e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_kernels_doors_are_an_exchange_too(routing):
    """Their references; kernels themselves have tests of their own."""
    mesh = build_mesh(MESHES["4"])
    found = spread(mesh, NvLink("expert", 4))(*draw(routing))
    assert_equal_layers(found, alone(routing), 2e-6)


def test_rows_of_nobody_may_hold_anything():
    """As where kernels leave memory unwritten."""

    class Poisoned(NvLink):
        def _rows(self, x, order, backend):
            rows = super()._rows(x, order, backend)
            used = jnp.arange(len(rows)) < order.sizes.sum()
            return jnp.where(used[:, None], rows, jnp.nan)

    found = spread(build_mesh(MESHES["4"]), Poisoned("expert", 4))(*draw("duplicates"))
    assert_equal_layers(found, alone("duplicates"), 2e-6)


@pytest.mark.parametrize("mesh", ["4", "2 hosts of 4"])
def test_tokens_that_cross_in_fp8_are_off_by_its_rounding(mesh):
    """One cast on the way there and, of gradients, one on the way back: 2**-4 of a value at most,
    2.6 % in the mean."""
    found = on(mesh, fp8=True)(*draw("random"))
    names = "out", "dx", "dw", "dgu", "dd"
    for name, one, other in zip(names, found, alone("random"), strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert 1e-3 < error < 0.06, name


def test_fp8_experts_are_those_of_one_device():
    """Their tokens are FP8 already: crossing changes no bit of them."""
    operands = draw("random", d=128, f=64)

    def layer(x, chosen, weights, gate_up, down, exchange=None):
        cast = [Fp8Weight(w, new_gauge(), *quantize_weight(w, 1, 1)) for w in (gate_up, down)]
        how = {} if exchange is None else {"exchange": exchange}
        return routed_experts(x, chosen, weights, *cast, **how)

    mesh = build_mesh(MESHES["4"])
    found = spread(mesh, choose_exchange(Exchange(), mesh), layer)(*operands)
    expected = jax.jit(with_gradients(layer))(*operands)
    # Weight gradients have tiles of 128 rows, which are other ones on every device.
    exact = expected[:3] + found[3:]
    assert_equal_layers(found, exact, 2e-6)
    for one, other in zip(found[3:], expected[3:], strict=True):
        assert np.linalg.norm(one - other) < 0.06 * np.linalg.norm(other)


@pytest.mark.parametrize(
    "exchange", [NvLink("expert", 4), pytest.param(None, marks=pytest.mark.slow)]
)
def test_shared_experts_beside_an_exchange(exchange):
    """As on one device: by the doors that compute them meanwhile, and in turn."""
    operands, generator = draw("random", d=128, f=64), np.random.default_rng(1)
    mlp = [0.3 * generator.standard_normal(shape, np.float32) for shape in ((128, 256), (128, 128))]

    def layer(x, chosen, weights, gate_up, down, exchange=HERE):
        cast = [Fp8Weight(w, new_gauge(), *quantize_weight(w, 1, 1)) for w in (gate_up, down)]
        shared = tuple(Fp8Weight(w, new_gauge(), *quantize_weight(w, 0, 1)) for w in mlp)
        return fp8_experts(x, chosen, weights, *cast, shared, exchange=exchange)

    mesh = build_mesh(MESHES["4"])
    exchange = exchange or choose_exchange(Exchange(), mesh)
    found = spread(mesh, exchange, layer)(*operands)
    expected = jax.jit(with_gradients(layer))(*operands)
    assert_equal_layers(found[:3] + expected[3:], expected, 2e-6)


def test_enough_room_changes_nothing_and_too_little_is_seen():
    enough = on("4", room=8.0)(*draw("all to one"))
    assert_equal_layers(enough, alone("all to one"), 2e-6)
    room, worst = (choose_exchange(Exchange(room=r), build_mesh(MESHES["4"])) for r in (1.0, None))
    assert room.rows(4096, 8, 64) == 4096 * 8
    assert worst.rows(4096, 8, 64) == 4 * 4096 * 8
    assert worst.rows(4096, 8, 2) == 4 * 4096 * 2


def test_a_batch_without_room_is_nan_and_not_silently_short():
    mesh = build_mesh(MESHES["8"])
    many = [np.tile(operand, (16, *[1] * (operand.ndim - 1))) if len(operand) == 8 * T else operand
            for operand in draw("all to one")]  # fmt: skip
    out = spread(mesh, choose_exchange(Exchange(room=1.0), mesh))(*many)[0]
    assert np.isnan(out).all()


def test_refusals_name_what_would_fit():
    mesh = build_mesh(MESHES["4"])
    with pytest.raises(ValueError, match=r"'nvlink': its kernels need Hopper .*; use 'dense'"):
        choose_exchange(Exchange(transport="nvlink"), mesh)
    with pytest.raises(ValueError, match="'ragged': XLA compiles it for GPUs only; use 'dense'"):
        choose_exchange(Exchange(transport="ragged"), mesh)
    with pytest.raises(ValueError, match="transport is 'tcp': use one of auto, dense, ragged"):
        Exchange(transport="tcp")
    with pytest.raises(ValueError, match=r"room is 0\.5: it must be 1"):
        Exchange(room=0.5)


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """What `jax.lax.ragged_all_to_all` is documented to do, by gathering everything."""
    gathered = [jax.lax.all_gather(x, axis_name)
                for x in (operand, input_offsets, send_sizes, output_offsets)]  # fmt: skip
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(operand))
    for sender, (x, starts, sizes, places) in enumerate(zip(*gathered, strict=True)):
        place = jnp.where(row < sizes[me], places[me] + row, len(output))
        output = output.at[place].set(jnp.take(x, starts[me] + row, axis=0, mode="clip"),
                                      mode="drop")  # fmt: skip
        output = jnp.where(recv_sizes[sender] == sizes[me], output, jnp.nan)
    return output


@pytest.mark.parametrize("routing", ROUTINGS)
def test_ragged_with_its_collective_spelled_out(routing, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    mesh = build_mesh(MESHES["4"])
    found = spread(mesh, SpreadBy("expert", 4, transport=Ragged()))(*draw(routing))
    assert_equal_layers(found, alone(routing), 2e-6)


def test_ragged_is_lowered_for_cuda():
    """No CPU compiles it."""
    mesh = build_mesh(MESHES["4"])
    step = spread(mesh, SpreadBy("expert", 4, transport=Ragged()))
    text = step.trace(*draw("random")).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("ragged_all_to_all") >= 4


def test_a_token_crosses_to_as_many_hosts_as_its_groups_are_limited_to():
    """Groups of experts lie host by host: V3's M = 4 of 8 groups, here 2 of 4."""
    mesh = build_mesh(MESHES["4 hosts of 2"])
    exchange = choose_exchange(Exchange(), mesh)
    config = replace(CONFIG, experts=E, top_k=K, groups=4, top_groups=2)
    scores = np.random.default_rng(0).random((8 * T, E), np.float32)
    chosen = np.asarray(select_experts(scores, np.zeros(E, np.float32), config))

    def hosts(chosen):
        needs = exchange.order(chosen, E // 8).route.needs_HTH
        return needs[jax.lax.axis_index("host")].sum(axis=1)

    spread_tokens = P(mesh.axis_names)
    count = jax.jit(
        jax.shard_map(
            hosts, mesh=mesh, in_specs=spread_tokens, out_specs=spread_tokens, check_vma=False
        )
    )(chosen)
    distinct = [len({expert // (E // 4) for expert in token}) for token in chosen]
    np.testing.assert_array_equal(count, distinct)
    assert max(distinct) == 2
