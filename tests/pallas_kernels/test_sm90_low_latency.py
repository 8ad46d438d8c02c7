"""The Hopper kernels of the low-latency exchange: interpreted, lowered, on one card, on several."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import device, sm90_low_latency_receive
from pallas_kernels import low_latency as door
from pallas_kernels import sm90_low_latency as sm90
from pallas_kernels.low_latency import open_inbox
from pallas_kernels.sm90_expert_combine import Ring
from pallas_kernels.sm90_expert_push import SENDERS
from pallas_kernels.sm90_low_latency import Buffers, Plan, dispatch_send
from pallas_kernels.sm90_low_latency_combine import combine_receive, combine_send
from pallas_kernels.sm90_low_latency_receive import dispatch_receive
from pallas_kernels.sm90_peers import OneCard
from tests.pallas_kernels.test_expert_exchange import AXIS, KINDS, cpus, on_mesh
from tests.pallas_kernels.test_low_latency import (
    alone,
    assert_received,
    drawn,
    interleaved,
    of_rounds,
    one_round,
    rounds,
    sums,
)
from tests.pallas_kernels.test_permute import BF16, assert_same_bits
from tests.pallas_kernels.test_sm90_expert_exchange import fresh, gpus

SMALL = Ring(bytes=8192, stages=SENDERS + 2)


def poisoned(plan):
    """Buffers in which all that nobody has sent is wrong."""
    given = sm90.shapes(plan)
    wrong = {
        name: jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)
        for name, x in given._asdict().items()
    }
    wrong |= dict(experts=wrong["experts"] - 7, rank=sm90.own_rank(plan))
    return Buffers(**{name: jax.new_ref(x) for name, x in wrong.items()})


class OnOneCard:
    """Rounds of all ranks on one device, by the kernels."""

    def __init__(self, plan, interpret=None, ctas=None, buffers=poisoned, **options):
        self.buffers, self.sent = buffers(plan), dict(plan=plan, interpret=interpret)
        self.kernel = self.sent | ({} if ctas is None else dict(ctas=ctas))
        self.options = options

    def dispatch(self, x, chosen, weights, **options):
        ranks = dispatch_send(x, chosen, weights, self.buffers, **self.sent, **options)
        return *dispatch_receive(self.buffers, **self.kernel), ranks

    def combine(self, y, got):
        *_, slots, weights, ranks = got
        y = y.reshape(len(y), -1, y.shape[-1])
        combine_send(y, slots, weights, self.buffers, **self.kernel, **self.options)
        return combine_receive(ranks, self.buffers, **self.kernel)


def plan_of(x, chosen, y, ctas=2, chunk=2):
    ranks, tokens, width = x.shape
    return Plan(OneCard(ranks), tokens, width, chosen.shape[-1], y.shape[1], ctas, chunk)


@pytest.fixture
def interpreted(capsys):
    """Runs a function of kernels and fails on a race."""

    def run(function, *operands, **options):
        options["interpret"] = plgpu.InterpretGPUParams(detect_races=True)
        found = jax.jit(functools.partial(function, **options))(*operands)
        jax.block_until_ready(found)
        assert "RACE" not in "".join(capsys.readouterr())
        return found

    return run


def card_round(x, chosen, weights, y, *, power_of_two=False, ctas=2, chunk=2, **options):
    card = OnOneCard(plan_of(x, chosen, y, ctas, chunk), ctas=ctas, ring=SMALL, **options)
    got = card.dispatch(x, chosen, weights, power_of_two=power_of_two)
    return got, card.combine(y, got), card.buffers.turns[...]


@pytest.mark.parametrize("kind", KINDS)
def test_round(kind, interpreted):
    operands = x, chosen, weights, y = drawn(kind, 2, 5, 3, 256, 3)
    got, out, turns = interpreted(card_round, *operands)
    assert_received(got, x, chosen, weights)
    assert_same_bits(out, sums(y, chosen, weights))
    assert (np.asarray(turns) == 1).all()


@pytest.mark.parametrize(
    ("ranks", "tokens", "k", "width", "ctas", "chunk"),
    [
        pytest.param(3, 4, 1, 128, 5, 1, marks=pytest.mark.slow),
        (2, 3, 8, 1152, 1, 4),
        pytest.param(1, 3, 5, 128, 2, 2, marks=pytest.mark.slow),
    ],
)
def test_sizes(ranks, tokens, k, width, ctas, chunk, interpreted):
    """Choices and scales that do not fill 16 bytes, CTAs without a token and with all of them."""
    operands = x, chosen, weights, y = drawn("random", ranks, tokens, k, width, 2)
    options = dict(ctas=ctas, chunk=chunk, power_of_two=True)
    got, out, _ = interpreted(card_round, *operands, **options)
    assert_received(got, x, chosen, weights, power_of_two=True)
    assert_same_bits(out, sums(y, chosen, weights))


def card_rounds(x, chosen, weights, y, *, cards=1, ring=SMALL, **options):
    """Rounds [n, ...] in a loop, in turn on so many buffers, all of which are under way at once."""
    plan = plan_of(x[0], chosen[0], y[0])
    held = [OnOneCard(plan, ctas=2, ring=ring, **options) for _ in range(cards)]

    def again(i, out):
        numbers = [cards * i + n for n in range(cards)]
        got = [
            card.dispatch(x[n], chosen[n], weights[n])
            for n, card in zip(numbers, held, strict=True)
        ]
        for n, card, own in zip(numbers, held, got, strict=True):
            out = out.at[n].set(card.combine(y[n], own))
        return out

    return lax.fori_loop(0, len(x) // cards, again, jnp.zeros_like(x))


@pytest.mark.parametrize(
    ("kinds", "cards"),
    [(["random", "empty ranks", "all to one"], 1), (["random", "duplicates"], 2)],
)
def test_rounds(kinds, cards, interpreted):
    """What a round leaves behind must not reach the next."""
    operands, home = of_rounds(kinds, 2, 3, 2, 128, 2)
    operands = [part.swapaxes(0, 1) for part in operands]
    found = interpreted(card_rounds, *operands, cards=cards)
    assert_same_bits(found, home.swapaxes(0, 1))


def shapes(devices, rounds, tokens, k, width, ranks, local):
    of, each = jax.ShapeDtypeStruct, (devices, *rounds)
    return [
        of((*each, tokens, width), BF16), of((*each, tokens, k), jnp.int32),
        of((*each, tokens, k), jnp.float32), of((*each, local, ranks * tokens, width), BF16),
    ]  # fmt: skip


@pytest.fixture
def hopper(monkeypatch):
    """As if there were such cards."""
    monkeypatch.setattr(device, "compute_capability", lambda: 9.0)


def lowered(run, operands):
    return run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("sizes", "names", "axis", "ranks"),
    [((4,), (AXIS,), AXIS, 4), ((2, 1, 2), ("data", "fsdp", AXIS), ("data", AXIS), 4)],
)
def test_lowers_for_cuda(sizes, names, axis, ranks, hopper):
    """Of a loop of rounds: where all meet once, and where two kernels push without doing so."""
    run = on_mesh(rounds, cpus(*sizes, names=names), axis=axis, backend="mosaic_gpu")
    text = lowered(run, shapes(4, (3,), 128, 8, 7168, ranks, 4))
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    collective = [line for line in calls if "uses_xla_collective_metadata = true" in line]
    assert (len(calls), len(collective)) == (5, 3)
    assert sum("skip_device_barrier = true" in line for line in collective) == 2
    assert len(re.findall('xla_replica_ids = "0,1,2,3"', text)) == 3


def test_lowers_for_one_rank(hopper):
    text = lowered(on_mesh(alone, cpus(1)), shapes(1, (), 33, 6, 1152, 1, 8))
    assert text.count("custom_call @mosaic_gpu") == 4
    assert "uses_xla_collective_metadata = true" not in text


@pytest.mark.parametrize("ranks", [4, 8])
def test_lowers_for_one_card(ranks):
    def run(*operands):
        card = OnOneCard(plan_of(*operands[:2], operands[3]))
        return card.combine(operands[3], card.dispatch(*operands[:3]))

    text = lowered(jax.jit(run), shapes(ranks, (), 128, 8, 7168, ranks, 2))
    assert text.count("custom_call @mosaic_gpu") == 4


def test_what_fits():
    fits = functools.partial(sm90_low_latency_receive.fits, width=7168, choices=8, experts=64)
    assert fits(8 * 256)
    assert not fits(8 * 512)


@pytest.mark.parametrize("sizes", [(128, 7160, 8, 64), (128, 7168, 33, 64), (2048, 7168, 8, 64)])
def test_kernels_refuse_what_does_not_fit(sizes, hopper):
    tokens, width, k, local = sizes

    def opened(_, axis, backend):
        return jnp.int32(open_inbox(*sizes, axis=axis, backend=backend).buffers is None)

    run = functools.partial(on_mesh, opened, cpus(4))
    with pytest.raises(ValueError, match=f"d is {width}, k {k}, T {tokens} and E {local}: mosaic"):
        run(backend="mosaic_gpu")(np.zeros(4))
    assert np.asarray(run(backend="auto")(np.zeros(4))).all()


# --- cards -------------------------------------------------------------------------------------

# ranks, tokens, k, width, experts, ctas, chunk
CARD_SHAPES = [
    (1, 3, 1, 128, 4, None, 1), (2, 5, 3, 384, 3, 2, 2), (4, 128, 8, 7168, 8, None, 2),
    (8, 67, 6, 2048, 5, 7, 4), (8, 256, 8, 1152, 16, None, 3),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", CARD_SHAPES)
def test_card(sizes, kind):
    *sizes, ctas, chunk = sizes
    operands = x, chosen, weights, y = drawn(kind, *sizes, seed=fresh())

    @jax.jit
    def run(*operands):
        card = OnOneCard(plan_of(x, chosen, y, ctas or 128, chunk), ctas=ctas)
        for _ in range(2):
            got = card.dispatch(*operands[:3])
            out = card.combine(operands[3], got)
        return got, out, card.buffers.turns[...]

    got, out, turns = run(*operands)
    assert_received(got, x, chosen, weights)
    assert_same_bits(out, sums(y, chosen, weights))
    assert (np.asarray(turns) == 2).all()


def bits(x):
    return lax.bitcast_convert_type(x, jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint32)


def differing(got, out, wanted, home):
    """How much of a round is not as the reference has it, in rows that count."""
    filled = jnp.arange(got[0].shape[-2]) < got[2][..., None]
    pairs = zip((*got[2:], out), (*wanted[2:], home), strict=True)
    wrong = [(one != other).sum() for one, other in pairs]
    for one, other in zip(got[:2], wanted[:2], strict=True):
        wrong.append(((bits(one) != bits(other)).any(-1) & filled).sum())
    return sum(wrong).astype(jnp.int32)


def changing(i, tokens, ranks, k, width, local, device):
    """The i-th round of a device: tokens, choices of several kinds, some of them none, weights."""
    keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), device), 4)
    x = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    scores = jax.random.normal(keys[1], (tokens, ranks * local))
    one = jnp.arange(ranks * local) // local == i % ranks
    scores += jnp.stack([0 * one, 9.0 * one, -9.0 * one])[i % 3]
    chosen = lax.top_k(scores, k)[1].astype(jnp.int32)
    chosen = jnp.where(jax.random.uniform(keys[2], chosen.shape) < 0.1, -1, chosen)
    chosen = jnp.where((i % 5 == 4) & (device == i % ranks), -1, chosen)
    return x, chosen, 2.0 ** jax.random.randint(keys[3], chosen.shape, -3, 3).astype(jnp.float32)


def results(got):
    """Of experts: powers of two times the tokens, so that sums of bfloat16 do not depend on FMA."""
    scale = 2.0 ** (jnp.arange(got[0].shape[-3]) % 4)
    whole = got[0].astype(jnp.bfloat16) * scale[:, None, None].astype(jnp.bfloat16)
    filled = jnp.arange(whole.shape[-2]) < got[2][..., None]
    return jnp.where(filled[..., None], whole, jnp.nan)


@pytest.mark.gpu
def test_card_of_full_size():
    """50 rounds of DeepSeek-V3's sizes, against the reference on every rank."""
    ranks, tokens, k, width, local = 4, 128, 8, 7168, 64
    plan = Plan(OneCard(ranks), tokens, width, k, local, 128, 2)
    draw_all = jax.vmap(
        lambda i, rank: changing(i, tokens, ranks, k, width, local, rank), in_axes=(None, 0)
    )

    @jax.jit
    def run():
        card = OnOneCard(plan, buffers=sm90.open_buffers)

        def again(i, wrong):
            x, chosen, weights = draw_all(i, jnp.arange(ranks))
            got = card.dispatch(x, chosen, weights)
            y = jax.vmap(results)(got)
            out = card.combine(y, got)
            wanted, home = on_one_card(x, chosen, weights, y)
            return wrong + differing(got, out, wanted, home)

        return lax.fori_loop(0, 50, again, jnp.int32(0))

    def on_one_card(x, chosen, weights, y):
        """The reference for ranks that a vmap stands for."""

        def of_rank(*operands):
            inbox = open_inbox(tokens, width, k, local, axis=AXIS, backend="reference")
            got, out = one_round(inbox, *operands)
            return tuple(got), out

        return jax.vmap(of_rank, axis_name=AXIS)(x, chosen, weights, y)

    assert int(run()) == 0
    assert int(run()) == 0


@pytest.mark.multi_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "k", "width"), [(5, 3, 384), (128, 8, 7168)])
def test_cards(tokens, k, width, kind):
    ranks = min(8, jax.device_count())
    x, chosen, weights, y = drawn(kind, ranks, tokens, k, width, 4, fresh())
    run = on_mesh(alone, gpus(ranks), backend="mosaic_gpu")
    for _ in range(2):
        got, out = run(x, chosen, weights, y)
        assert_received(got, x, chosen, weights)
        assert_same_bits(out, sums(y, chosen, weights))


@pytest.mark.multi_gpu
def test_cards_two_inboxes():
    ranks = min(8, jax.device_count())
    operands, home = of_rounds(["random", "duplicates"], ranks, 33, 6, 2048, 4)
    run = on_mesh(interleaved, gpus(ranks), backend="mosaic_gpu")
    assert_same_bits(run(*operands), home)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("ctas", "chunk"), [(None, 2), (None, 1), (16, 4)])
def test_cards_under_load(ctas, chunk):
    """500 rounds without a pause; a row that is stale, torn or from elsewhere shows."""
    ranks, tokens, k, width, local = min(8, jax.device_count()), 128, 8, 7168, 16

    def run(_, axis):
        given = tokens, width, k, local
        inbox = open_inbox(*given, axis=axis, ctas=ctas, chunk=chunk, backend="mosaic_gpu")
        plain = open_inbox(*given, axis=axis, backend="reference")

        def again(i, wrong):
            x, chosen, by = changing(i, tokens, ranks, k, width, local, lax.axis_index(axis))
            got, wanted = (
                door.dispatch_receive(each, door.dispatch_send(each, x, chosen, by))
                for each in (inbox, plain)
            )
            y = results(wanted)
            out, home = (
                door.combine_receive(each, door.combine_send(each, y, known))
                for each, known in ((inbox, got), (plain, wanted))
            )
            return wrong + differing(got, out, wanted, home)

        return lax.fori_loop(0, 500, again, jnp.int32(0))

    assert not np.asarray(on_mesh(run, gpus(ranks))(np.zeros(ranks))).any()
