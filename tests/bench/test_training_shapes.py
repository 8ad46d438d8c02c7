"""Which calls of a training step are timed, and what they count as their work."""

import pytest

from dsjax.bench import Sizes
from dsjax.bench.training_calls import TIMED, work
from dsjax.bench.training_shapes import LITE, PARTS, Shape, flops, select

TINY = Sizes(16, 2, 128, 4, 2, 128, 128, 256)


def test_default_shapes_are_those_of_v2_lite():
    found = [f"{kind} {shape}" for kind, shape in select(LITE, PARTS)]
    assert found == [
        "quantize_tiles 32768x2048",
        "quantize_both 32768x2048",
        "quantize_both g64x196608x2816",
        "quantize_transposed 32768x2816",
        "quantize_transposed g64x196608x1408",
        "requantize_transposed 32768x2048",
        "requantize_transposed g64x196608x2048",
        "quantize_blocks_both 2048x5632",
        "quantize_blocks_both 64x2048x2816",
        "rmsnorm_quantize 32768x2048",
        "swiglu_quantize_both 32768x5632",
        "swiglu_quantize_both 196608x2816",
        "swiglu_backward 32768x5632",
        "swiglu_backward g64x196608x2816",
        "spread_rows g64x32768x6x2048",
        "spread_quantized g64x32768x6x2048",
        "combine_rows g64x32768x6x2048",
        "linear_cross_entropy 8x4096x2048x102400",
        "linear_cross_entropy_grad 8x4096x2048x102400",
    ]


def test_parts_come_in_their_order_and_once():
    kinds = [kind for kind, _ in select(TINY, ("head", "permute", "head"))]
    assert kinds == [
        "spread_rows", "spread_quantized", "combine_rows", "linear_cross_entropy",
        "linear_cross_entropy_grad",
    ]  # fmt: skip
    assert {kind for kind, _ in select(TINY, PARTS)} == TIMED.keys()


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"tokens": 0}, "tokens is 0: expected 1 or more"),
        ({"vocab_size": -8}, "vocab_size is -8"),
        ({"tokens": 100}, "tokens is 100: expected a multiple of batch = 8"),
        ({"experts": 4}, "top_k is 6: expected at most experts = 4"),
    ],
)
def test_sizes_that_cannot_run_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        Sizes(**sizes)


@pytest.mark.parametrize(
    ("parts", "named"), [((), "no parts"), (("casts", "gemm"), "'gemm' is unknown.*casts, swiglu")]
)
def test_parts_that_do_not_exist_are_refused(parts, named):
    with pytest.raises(ValueError, match=named):
        select(TINY, parts)


# --- work ----------------------------------------------------------------------------------------

M, K, G = 200, 160, 3  # two tiles of columns, the second one not whole
PADDED, GROUPED = 256, 128 * (2 + G)  # columns of the transposed forms of 200 rows
TILES, TILES_T = M * K + 4 * M * 2, PADDED * K + 4 * K * 2
GROUPED_T = GROUPED * K + 4 * K * (2 + G)
F, T, C, D, P = 128, 24, 2, 160, 300
GATE_UP, SLOTS = 2 * M * (2 * F), 4 * T * C
CACHE = M * 2 * F + 4 * M * 2


@pytest.mark.parametrize(
    ("kind", "shape", "wanted"),
    [
        ("quantize_tiles", Shape((M, K)), 2 * M * K + TILES),
        ("quantize_both", Shape((M, K)), 2 * M * K + TILES + TILES_T),
        ("quantize_both", Shape((M, K), G), 2 * M * K + 4 * G + TILES + GROUPED_T),
        ("quantize_transposed", Shape((M, K)), 2 * M * K + TILES_T),
        ("quantize_transposed", Shape((M, K), G), 2 * M * K + 4 * G + GROUPED_T),
        ("requantize_transposed", Shape((M, K)), TILES + TILES_T),
        ("requantize_transposed", Shape((M, K), G), TILES + 4 * G + GROUPED_T),
        ("quantize_blocks_both", Shape((M, K)), (4 + 1 + 1) * M * K + 4 * 2 * 2),
        ("quantize_blocks_both", Shape((G, M, K)), G * ((4 + 1 + 1) * M * K + 4 * 2 * 2)),
        ("rmsnorm_quantize", Shape((M, K)), 2 * M * K + 4 * K + TILES),
        ("swiglu_quantize_both", Shape((M, 2 * F)), GATE_UP + M * F + 4 * M + CACHE),
        ("swiglu_backward", Shape((M, 2 * F)),
         CACHE + 2 * M * F + CACHE + 3 * F * (PADDED + 4 * 2)),
        ("swiglu_backward", Shape((M, 2 * F), G),
         CACHE + 2 * M * F + 4 * M + 4 * G + CACHE + 3 * F * (GROUPED + 4 * (2 + G)) + 4 * M),
        ("spread_rows", Shape((T, C, D), G), 2 * T * D + SLOTS + 2 * C * T * D),
        ("spread_quantized", Shape((T, C, D), G), SLOTS + (1 + C) * (T * D + 4 * T * 2)),
        ("combine_rows", Shape((T, C, D), G), 2 * C * T * D + SLOTS + 4 * T * C + 2 * T * D),
        ("linear_cross_entropy", Shape((2, T, D, P)),
         2 * 2 * T * D + 4 * D * P + 4 * 2 * T + 4 + 4 * 2 * T),
        ("linear_cross_entropy_grad", Shape((2, T, D, P)),
         2 * (2 * 2 * T * D + 4 * D * P) + 4 * 2 * T + 4 + 4 * 2 * T),
    ],
)  # fmt: skip
def test_bytes_by_hand(kind, shape, wanted):
    assert work(kind, shape).bytes == wanted


def test_only_the_head_counts_operations():
    shape = Shape((2, 3, 5, 7))
    assert flops("linear_cross_entropy", shape) == 2 * (2 * 3) * 5 * 7
    assert flops("linear_cross_entropy_grad", shape) == 3 * 2 * (2 * 3) * 5 * 7
    counted = {kind for kind, shape in select(TINY, PARTS) if flops(kind, shape)}
    assert counted == {"linear_cross_entropy", "linear_cross_entropy_grad"}
