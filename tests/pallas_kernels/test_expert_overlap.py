"""Exchanges beside FP8 products: the doors on CPUs, kernels interpreted, lowered and on cards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_expert_dispatch, sm90_expert_push, sm90_fp8_beside
from pallas_kernels.expert_exchange import combine_rows, dispatch_quantized
from pallas_kernels.expert_overlap import MOST_CTAS, combine_beside, dispatch_beside
from pallas_kernels.fp8_products import Product
from pallas_kernels.sm90_fp8_gemm import fp8_gemm, fp8_gemm_beside
from pallas_kernels.sm90_peers import ALONE, OneCard, Peers
from pallas_kernels.sm90_tile import Tile
from tests.pallas_kernels.test_expert_exchange import (
    KINDS,
    assert_dispatched,
    cpus,
    on_mesh,
    poisoned,
    route,
)
from tests.pallas_kernels.test_permute import BF16, E4M3, assert_same_bits, draw
from tests.pallas_kernels.test_sm90_expert_exchange import fresh, gpus
from tests.pallas_kernels.test_sm90_expert_push import NCCL, powers

SMALL = sm90_expert_dispatch.Ring(bytes=4096, stages=2, walkers=2)
EXCHANGES = dispatch_quantized, combine_rows


def operands(m, n, k, by_row=False, ranks=1, seed=0):
    """(a, a_scale, b, b_scale) of each rank."""
    blocks = -(-k // 128)
    shapes = (m, k), (m, blocks), (n, k), (n if by_row else -(-n // 128), blocks)
    dtypes = (E4M3, np.float32) * 2
    return [
        draw((ranks, *shape), dtype, seed + i)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def moved(exchange, routing, width, seed=0):
    """What the exchange takes of each rank, NaN in rows of sums that nobody names."""
    ranks, tokens, _ = routing.ranks.shape
    if exchange is combine_rows:
        y = poisoned((ranks, routing.rows, width), routing, BF16, seed)
        weights = powers(routing.slots.shape)
        return y, routing.slots, weights, routing.tokens, routing.count, routing.ranks
    scale = draw((ranks, tokens, -(-width // 128)), seed=seed)
    return draw((ranks, tokens, width), E4M3, seed), scale, *routing.layout


def run(exchange, product, given, *, by_row=False, apart=False, rows=None, ctas=None, **how):
    """(product, what the exchange gives), computed beside one another or apart."""
    how |= {} if rows is None else dict(rows=rows)
    a, a_scale, b, b_scale = product
    product = Product((a, a_scale), (b, b_scale), jnp.dtype(BF16), by_row=by_row)
    if apart:
        return product.alone(how.get("backend", "auto")), exchange(*given, **how)
    beside = {dispatch_quantized: dispatch_beside, combine_rows: combine_beside}[exchange]
    return beside(product, *given, ctas=ctas, **how)


def of(exchange, routing, mesh, **options):
    """`run` over a mesh, of (operands, what is moved) of its ranks."""
    if exchange is dispatch_quantized:
        options["rows"] = routing.rows
    return on_mesh(functools.partial(run, exchange), mesh, **options)


def assert_as_apart(exchange, routing, found, wanted):
    """Bit for bit where rows are somebody's."""
    assert_same_bits(found[0], wanted[0])
    if exchange is combine_rows:
        assert_same_bits(found[1], wanted[1])
        return
    rank, slot = np.nonzero(taken(routing))
    for one, other in zip(found[1], wanted[1], strict=True):
        assert_same_bits(np.asarray(one)[rank, slot], np.asarray(other)[rank, slot])


def taken(routing):
    """Which rows of each rank somebody has."""
    found = np.zeros((len(routing.slots), routing.rows), bool)
    for own, slots in zip(found, routing.slots, strict=True):
        own[slots[slots >= 0]] = True
    return found


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_doors_are_both_functions(kind, exchange):
    routing = route(kind, 4, 5, 3)
    given = operands(136, 64, 128, ranks=4), moved(exchange, routing, 128)
    found, wanted = (
        of(exchange, routing, cpus(4), backend="reference", apart=apart)(*given)
        for apart in (False, True)
    )
    assert_as_apart(exchange, routing, found, wanted)


@pytest.mark.parametrize(
    ("tile", "by_row"),
    [(Tile(1, 64, 2), True), (Tile(1, 64, 2, beside=2), False), (Tile(2, 64, 2, below=2), False)],
)
def test_dispatch_beside_a_gemm(tile, by_row, capsys):
    """Interpreted, with tiles of one SM and of two; fails on a race."""
    routing = route("random", 1, 6, 3)
    q, scale, *layout = (x[0] for x in moved(dispatch_quantized, routing, 256))
    a, a_scale, b, b_scale = (jnp.asarray(x) for x in operands(96, 128, 256, by_row))
    product = a, a_scale[0].T, b, b_scale[0].T if by_row else b_scale
    how = dict(tile=tile, out_dtype=jnp.float32, sms=4)
    how["interpret"] = plgpu.InterpretGPUParams(detect_races=True)

    @jax.jit
    def beside(q, scale, slots, tokens, count, *product):
        traffic = sm90_expert_dispatch.traffic(
            "dispatch_quantized", q, scale, slots, tokens, count, routing.rows, ALONE, 2, SMALL
        )
        return fp8_gemm_beside(traffic, *product, **how)

    out, (rows, scales) = beside(q, scale, *layout, *product)
    assert_same_bits(out, fp8_gemm(*product, None, kind="dense", **how))
    assert_dispatched(rows[None], q[None], routing)
    assert_dispatched(scales[None, :, : scale.shape[1]], scale[None], routing)
    assert "RACE" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("by_row", [False, True])
def test_lowers_for_cuda(exchange, by_row):
    """One kernel, which multiplies and reaches the devices of the whole mesh."""
    routing = route("random", 4, 65, 3)
    given = operands(264, 384, 256, by_row, ranks=4), moved(exchange, routing, 512)

    def kernel(product, given, axis):
        static = dict(by_row=by_row, out_dtype=BF16, sum_bits=None, ctas=32)
        static["peers"] = Peers.along(axis)
        if exchange is combine_rows:
            y, slots, weights, _, _, ranks = given
            return sm90_fp8_beside.combine_push(product, y, slots, weights, ranks, **static)
        return sm90_fp8_beside.dispatch_quantized(product, *given, rows=routing.rows, **static)

    lowered = on_mesh(kernel, cpus(4)).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @mosaic_gpu") == 1
    assert lowered.count('xla_replica_ids = "0,1,2,3"') == 1


def test_ranks_on_one_card_have_no_gemm_of_their_own():
    q, scale, *layout = moved(dispatch_quantized, route("random", 2, 5, 3), 256)
    traffic = sm90_expert_dispatch.traffic("rows", q, scale, *layout, 20, OneCard(2), 2)
    product = a, a_scale, b, b_scale = [jnp.asarray(x) for x in operands(96, 128, 256)]
    product = a, a_scale[0].T, b, b_scale
    with pytest.raises(TypeError, match=r"ranks are OneCard\(count=2\): a GEMM is of one device"):
        fp8_gemm_beside(traffic, *product, tile=Tile(1, 64, 2), out_dtype=BF16, sms=4)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_refusals_and_gradients(exchange):
    routing = route("random", 2, 5, 3)
    product, given = operands(136, 64, 128, ranks=2), moved(exchange, routing, 128)
    of_both = functools.partial(of, exchange, routing, cpus(2))
    for ctas in (0, 101):
        with pytest.raises(ValueError, match=f"ctas is {ctas}: expected 1 to 100, which leave"):
            of_both(ctas=ctas)(product, given)
    a, a_scale, *b = product
    with pytest.raises(ValueError, match=r"a_scale is float32 \(136, 2\)"):
        of_both()([a, np.concatenate([a_scale] * 2, -1), *b], given)
    with pytest.raises(TypeError, match="not differentiable"):
        jax.jvp(lambda s: of_both()([a, s, *b], given)[0], [a_scale], [a_scale])


@pytest.mark.gpu
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "tokens", "choices", "width", "ctas"),
    [(136, 64, 128, 3, 1, 128, 1), (1000, 1056, 400, 517, 3, 2048, 16),
     (4096, 5632, 2048, 2048, 4, 2048, None), (300, 4096, 7168, 1030, 4, 7168, 100)],
)  # fmt: skip
def test_card(exchange, by_row, m, n, k, tokens, choices, width, ctas):
    """A rank by itself, which moves within its card."""
    seed = fresh()
    routing = route("random", 1, tokens, choices, seed)
    given = operands(m, n, k, by_row, seed=seed), moved(exchange, routing, width, seed)
    options = dict(by_row=by_row, backend="mosaic_gpu")
    wanted = of(exchange, routing, gpus(1), apart=True, **options)(*given)
    beside = of(exchange, routing, gpus(1), ctas=ctas, **options)
    for _ in range(3):
        assert_as_apart(exchange, routing, beside(*given), wanted)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_cards(kind, exchange):
    seed, ranks = fresh(), min(8, jax.device_count())
    routing = route(kind, ranks, 517, 6, seed)
    given = operands(1000, 1056, 400, ranks=ranks, seed=seed), moved(exchange, routing, 2048, seed)
    wanted = of(exchange, routing, gpus(ranks), apart=True, backend="mosaic_gpu")(*given)
    beside = of(exchange, routing, gpus(ranks), backend="mosaic_gpu")
    for _ in range(20):
        assert_as_apart(exchange, routing, beside(*given), wanted)


def test_most_ctas_leave_room_for_others():
    assert MOST_CTAS + NCCL <= sm90_expert_push.SMS
    assert max(sm90_fp8_beside.DISPATCH_CTAS, sm90_fp8_beside.COMBINE_CTAS) <= MOST_CTAS
