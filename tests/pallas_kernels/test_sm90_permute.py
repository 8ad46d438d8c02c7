"""The Hopper kernels of gathered, spread and summed rows: interpreted, lowered, on a card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_permute, sm90_permute_combine
from pallas_kernels.permute import (
    combine_rows,
    gather_quantized,
    gather_rows,
    spread_quantized,
    spread_rows,
)
from tests.pallas_kernels.test_permute import (
    BF16,
    DTYPES,
    E4M3,
    assert_near_sum,
    assert_same_bits,
    draw,
    indices,
    permutation,
    spread,
)

RING = sm90_permute.Ring(bytes=256, stages=3, ctas=2)


def interpreted(kernel, *operands, capsys, **options):
    """Fails on a race."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    found = jax.jit(functools.partial(kernel, interpret=interpret, **options))(*operands)
    jax.block_until_ready(found)
    assert "RACE" not in "".join(capsys.readouterr())
    return found


in_rings = pytest.mark.parametrize(
    "ring", [RING, RING._replace(stages=2), RING._replace(bytes=1, ctas=1), RING._replace(stages=5)]
)


@pytest.mark.parametrize(
    ("tokens", "width", "rows", "dtype"),
    [(9, 32, 37, BF16), (1, 16, 3, E4M3), (20, 16, 40, np.float32), (5, 208, 9, E4M3)],
)
def test_gather(tokens, width, rows, dtype, capsys):
    x, chosen = draw((tokens, width), dtype), indices((rows,), tokens)
    x[-1:] = np.nan
    found = interpreted(sm90_permute.gather, x, chosen, ring=RING, sms=1, capsys=capsys)
    assert_same_bits(found, x[chosen])


@in_rings
def test_rings(ring, capsys):
    x, slots = draw((11, 32), BF16), permutation(11, 3)
    rows = np.argsort(slots.reshape(-1)).astype(np.int32) // 3
    options = dict(ring=ring, sms=1, capsys=capsys)
    assert_same_bits(interpreted(sm90_permute.gather, x, rows, **options), x[rows])
    assert_same_bits(interpreted(sm90_permute.spread, x, slots, **options), x[rows])


@pytest.mark.parametrize(
    ("tokens", "choices", "width", "dtype"),
    [
        (9, 6, 32, BF16),
        (1, 1, 16, E4M3),
        (2, 33, 16, E4M3),
        (13, 2, 208, E4M3),
        (6, 4, 4, np.float32),
    ],
)
def test_spread(tokens, choices, width, dtype, capsys):
    x, slots = draw((tokens, width), dtype), permutation(tokens, choices)
    found = interpreted(sm90_permute.spread, x, slots, ring=RING, sms=1, capsys=capsys)
    assert_same_bits(found, spread(x, slots))


@pytest.mark.parametrize(("tokens", "width"), [(7, 144), (1, 16)])
def test_quantized(tokens, width, capsys):
    q, scale = draw((tokens, width), E4M3), draw((tokens, -(-width // 128)))
    rows, slots = indices((11,), tokens), permutation(tokens, 3)
    options = dict(ring=RING, sms=1, capsys=capsys)
    found = interpreted(sm90_permute.gather_quantized, q, scale, rows, **options)
    assert_same_bits(found[0], q[rows])
    assert_same_bits(found[1], scale[rows])
    found = interpreted(sm90_permute.spread_quantized, q, scale, slots, **options)
    assert_same_bits(found[0], spread(q, slots))
    assert_same_bits(found[1], spread(scale, slots))


@pytest.mark.parametrize(
    ("tokens", "choices", "width", "at_once", "together"),
    [(5, 3, 256, 1024, 2), (1, 1, 128, 1, 4), (3, 16, 384, 4096, 1), (4, 2, 2048, 2048, 3)],
)
@pytest.mark.parametrize("weighted", [True, False])
def test_combine(tokens, choices, width, at_once, together, weighted, capsys):
    y, slots = draw((tokens * choices + 2, width), BF16), indices((tokens, choices), tokens)
    y[tokens:] = np.nan  # of which no slot names any
    weights = draw((tokens, choices)) if weighted else None
    options = dict(at_once=at_once, together=together, capsys=capsys)
    found = interpreted(sm90_permute_combine.combine, y, slots, weights, **options)
    assert_near_sum(found, y, slots, weights)


def test_indices_are_clamped(capsys):
    """Traced ones may be anything: nothing outside of the array is read."""
    x, y = draw((4, 32), BF16), draw((4, 128), BF16)
    rows = np.array([-1, 4, 2**31 - 1, -(2**31), 2], np.int32)
    clamped = np.clip(rows, 0, 3)
    found = interpreted(sm90_permute.gather, x, rows, ring=RING, sms=1, capsys=capsys)
    assert_same_bits(found, x[clamped])
    found = interpreted(sm90_permute_combine.combine, y, rows[:, None], None, capsys=capsys)
    assert_same_bits(found, y[clamped])


def test_pieces_of_rows():
    """As wide as allowed, whole numbers of vectors, none left over."""
    piece = sm90_permute_combine._piece
    assert [piece(2048, most) for most in (1, 1024, 2047, 2048, 9999)] == [1024] * 3 + [2048] * 2
    assert piece(7168, 2048) == 1024
    assert [piece(384, most) for most in (1, 256, 384)] == [128, 128, 384]


def test_batches_fit_shared_memory():
    """Of the widest rows that `permute` lets through, at least two stages and one CTA."""
    x = jax.ShapeDtypeStruct((8, 65536), E4M3)
    rows = jax.ShapeDtypeStruct((8,), jnp.int32)
    run = functools.partial(sm90_permute.gather, sms=132)
    jax.jit(run).trace(x, rows).lower(lowering_platforms=("cuda",))


def shaped(name, tokens, choices, width, dtype):
    of, rows = jax.ShapeDtypeStruct, tokens * choices
    x, slots, chosen = (
        of((tokens, width), dtype), of((tokens, choices), jnp.int32), of((rows,), jnp.int32)
    )  # fmt: skip
    q, scale = of(x.shape, E4M3), of((tokens, -(-width // 128)), jnp.float32)
    y, weights = of((rows, width), BF16), of(slots.shape, jnp.float32)
    moved = functools.partial
    return {
        "gather": (moved(sm90_permute.gather, sms=132), [x, chosen]),
        "gather_quantized": (moved(sm90_permute.gather_quantized, sms=132), [q, scale, chosen]),
        "spread": (moved(sm90_permute.spread, sms=132), [x, slots]),
        "spread_quantized": (moved(sm90_permute.spread_quantized, sms=132), [q, scale, slots]),
        "combine": (sm90_permute_combine.combine, [y, slots, weights]),
        "combine unweighted": (moved(sm90_permute_combine.combine, weights=None), [y, slots]),
    }[name]


NAMES = [
    "gather",
    "gather_quantized",
    "spread",
    "spread_quantized",
    "combine",
    "combine unweighted",
]


@pytest.mark.parametrize(
    ("tokens", "choices", "width", "dtype"),
    [
        (32768, 6, 2048, BF16),
        (1, 1, 128, np.float32),
        pytest.param(4097, 8, 7168, E4M3, marks=pytest.mark.slow),
        pytest.param(333, 16, 1536, BF16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_lowers_for_cuda(name, tokens, choices, width, dtype):
    kernel, operands = shaped(name, tokens, choices, width, dtype)
    jax.jit(kernel).trace(*operands).lower(lowering_platforms=("cuda",))


def fresh():
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return seed


def twice(function, *operands, **options):
    """The kernel's result, after it has given it twice."""
    run = jax.jit(functools.partial(function, backend="mosaic_gpu", **options))
    found, again = run(*operands), run(*operands)
    jax.tree.map(assert_same_bits, again, found)
    return found


# tokens, choices, width
CARD_SHAPES = [
    (1, 1, 128), (1, 16, 2048), (7, 3, 384), (129, 6, 2048), (1000, 8, 7168), (4099, 6, 2048),
    (20011, 2, 1024),
]  # fmt: skip
on_shapes = pytest.mark.parametrize(("tokens", "choices", "width"), CARD_SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@on_shapes
def test_card_moved(tokens, choices, width, dtype):
    """Rows repeat, some are not named at all, and NaN are moved like all else."""
    seed = fresh()
    x, slots = draw((tokens, width), dtype, seed), permutation(tokens, choices, seed)
    chosen = indices((tokens * choices + 5,), tokens, seed)
    x[tokens // 2, ::3] = np.nan
    assert_same_bits(twice(gather_rows, x, chosen), x[chosen])
    assert_same_bits(twice(spread_rows, x, slots), spread(x, slots))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 48, 208, 4112])
def test_card_narrow_and_odd_rows(width):
    seed = fresh()
    x, chosen = draw((301, width), E4M3, seed), indices((777,), 301, seed)
    assert_same_bits(twice(gather_rows, x, chosen), x[chosen])
    slots = permutation(301, 5, seed)
    assert_same_bits(twice(spread_rows, x, slots), spread(x, slots))


@pytest.mark.gpu
@on_shapes
def test_card_quantized(tokens, choices, width):
    seed = fresh()
    q, scale = draw((tokens, width), E4M3, seed), draw((tokens, -(-width // 128)), seed=seed)
    chosen, slots = (
        indices((tokens * choices + 5,), tokens, seed),
        permutation(tokens, choices, seed),
    )
    scale[tokens // 2] = np.nan
    found = twice(gather_quantized, q, scale, chosen)
    assert_same_bits(found[0], q[chosen])
    assert_same_bits(found[1], scale[chosen])
    found = twice(spread_quantized, q, scale, slots)
    assert_same_bits(found[0], spread(q, slots))
    assert_same_bits(found[1], spread(scale, slots))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 144, 2064, 16384])
def test_card_quantized_of_odd_widths(width):
    """A last tile of less than 128, batches of one row, and more tiles than threads."""
    seed = fresh()
    q, scale = draw((77, width), E4M3, seed), draw((77, -(-width // 128)), seed=seed)
    chosen, slots = indices((501,), 77, seed), permutation(77, 7, seed)
    found = twice(gather_quantized, q, scale, chosen)
    assert_same_bits(found[0], q[chosen])
    assert_same_bits(found[1], scale[chosen])
    found = twice(spread_quantized, q, scale, slots)
    assert_same_bits(found[1], spread(scale, slots))


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [True, False])
@on_shapes
def test_card_combine(tokens, choices, width, weighted):
    seed = fresh()
    used = tokens * choices
    y, slots = draw((used + 9, width), BF16, seed), indices((tokens, choices), used, seed)
    y[np.setdiff1d(np.arange(used + 9), slots)] = np.nan
    weights = draw((tokens, choices), seed=seed) if weighted else None
    assert_near_sum(twice(combine_rows, y, slots, weights), y, slots, weights)


@pytest.mark.gpu
@pytest.mark.parametrize("choices", [2, 5, 32])
def test_card_combine_of_many(choices):
    seed = fresh()
    y, slots = draw((300, 384), BF16, seed), indices((65, choices), 300, seed)
    weights = draw((65, choices), seed=seed)
    assert_near_sum(twice(combine_rows, y, slots, weights), y, slots, weights)


@pytest.mark.gpu
def test_card_there_and_back():
    """Weights of 1 / k, a power of two: the sum of a token's copies is the token."""
    seed = fresh()
    x, slots = draw((3001, 2048), BF16, seed), permutation(3001, 4, seed)
    weights = np.full(slots.shape, 0.25, np.float32)

    @jax.jit
    def run(x, slots, weights):
        rows = spread_rows(x, slots, backend="mosaic_gpu")
        return combine_rows(rows, slots, weights, backend="mosaic_gpu")

    assert_same_bits(run(x, slots, weights), x)


@pytest.mark.gpu
def test_card_nothing():
    x, none = draw((4, 128), BF16), np.zeros((0,), np.int32)
    assert gather_rows(x, none, backend="mosaic_gpu").shape == (0, 128)
    empty = none.reshape(0, 3)
    assert spread_rows(x[:0], empty, backend="mosaic_gpu").shape == (0, 128)
    assert combine_rows(x, empty, backend="mosaic_gpu").shape == (0, 128)


@pytest.mark.gpu
def test_card_clamps():
    x, y = draw((4, 128), BF16), draw((4, 128), BF16)
    rows = np.array([-1, 4, 2**31 - 1, -(2**31), 2], np.int32)
    clamped = np.clip(rows, 0, 3)
    assert_same_bits(twice(gather_rows, x, rows), x[clamped])
    assert_same_bits(twice(combine_rows, y, rows[:, None]), y[clamped])


@pytest.mark.gpu
def test_card_more_bytes_than_32_bits_count():
    """The last rows of an output of 2**32 + elements, and of such an input."""
    rows, width = (1 << 21) + 3, 2048
    x = jnp.asarray(draw((5, width), E4M3))
    chosen = jnp.arange(rows, dtype=jnp.int32) % 5
    big = jax.jit(functools.partial(gather_rows, backend="mosaic_gpu"))(x, chosen)
    for at in (0, 1 << 20, rows - 1):
        assert_same_bits(big[at], x[at % 5])
    back = jnp.array([rows - 1, 0, rows - 2], jnp.int32)
    assert_same_bits(twice(gather_rows, big, back), x[back % 5])


@pytest.mark.gpu
def test_card_rings_under_load():
    """Many runs of many batches: a stage that is filled before it has been stored shows here."""
    seed = fresh()
    x = jnp.asarray(draw((32768, 2048), E4M3, seed))
    slots = jnp.asarray(permutation(32768, 6, seed))
    rows = jnp.argsort(slots.reshape(-1)).astype(jnp.int32) // 6

    @jax.jit
    def differing(x, slots, rows):
        wanted = jax.lax.bitcast_convert_type(jnp.take(x, rows, axis=0), jnp.uint8)
        found = (
            gather_rows(x, rows, backend="mosaic_gpu"), spread_rows(x, slots, backend="mosaic_gpu")
        )  # fmt: skip
        return [(jax.lax.bitcast_convert_type(a, jnp.uint8) != wanted).sum() for a in found]

    assert all(int(n) == 0 for _ in range(100) for n in differing(x, slots, rows))
