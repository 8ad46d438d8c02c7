"""The Hopper GEMM kernels in the interpreter, which also looks for races, tile class by class."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_gemm, sm90_tiles
from pallas_kernels.sm90_bf16_gemm import bf16_gemm
from pallas_kernels.sm90_bf16_wgrad import bf16_grouped_wgrad
from pallas_kernels.sm90_fp8_gemm import fp8_gemm
from pallas_kernels.sm90_tile import Tile

SUMS, ROUNDING = 3e-6, 3e-3
GROUPS = [70, 0, 1, 200, 0, 29]


def interpreted(kernel, *operands, tile, n, **options):
    """The first n columns of the kernel's output; fails when the interpreter reports a race."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        out = kernel(
            *operands, tile=tile, sms=2 * tile.cluster,
            interpret=plgpu.InterpretGPUParams(detect_races=True), **options,
        )  # fmt: skip
        out = np.asarray(out, np.float64)[..., :n]
    assert "RACE" not in said.getvalue(), said.getvalue()
    return out


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def e4m3(rng, *shape):
    return draw(rng, *shape).astype(jnp.float8_e4m3fn)


def scales(rng, *shape):
    return jnp.asarray(np.exp2(rng.uniform(-6, 6, shape)), jnp.float32)


def apart(found, expected):
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30)


def by_row(q, scale):
    """q [rows, K] times scale [K / 128, rows]."""
    spread = np.asarray(scale, np.float64).T[: q.shape[0]].repeat(128, 1)[:, : q.shape[1]]
    return np.asarray(q, np.float64) * spread


def by_block(q, scale):
    """q [N, K] times scale [N / 128, K / 128]."""
    spread = np.asarray(scale, np.float64).repeat(128, 0)[: q.shape[0]].repeat(128, 1)
    return np.asarray(q, np.float64) * spread[:, : q.shape[1]]


DENSE = {
    "large": Tile(2, 128, 2, down=2, beside=2),
    "three warpgroups": Tile(3, 128, 2, beside=2, slots=2),
    "scales within a product": Tile(2, 192, 2, below=2),
    "products side by side": Tile(3, 96, 2, across=2, slots=2),
    "several blocks at once": Tile(2, 128, 3, depth=2),
    "thin": Tile(1, 64, 4, depth=2),
    "thin and shared": Tile(1, 64, 5, below=2, depth=4),
    "thin and wide": Tile(1, 192, 2, slots=3),
    "thin and split": Tile(1, 64, 3, depth=2, splits=2),
    "odd width": Tile(2, 112, 2),
    "four slots": Tile(2, 128, 2, down=2, slots=4),
}


@pytest.mark.parametrize("tile", DENSE.values(), ids=DENSE)
def test_fp8_dense(tile):
    rng = np.random.default_rng(0)
    m, n, k = 136, 400, 512
    a, b = e4m3(rng, 1, m, k), e4m3(rng, 1, n, k)
    a_scale, b_scale = scales(rng, k // 128, m), scales(rng, 1, -(-n // 128), k // 128)
    out = interpreted(
        fp8_gemm, a, a_scale, b, b_scale, None, tile=tile, n=n, kind="dense",
        out_dtype=jnp.float32,
    )  # fmt: skip
    assert apart(out.sum(0), by_row(a[0], a_scale) @ by_block(b[0], b_scale[0]).T) < SUMS


@pytest.mark.parametrize("tile", [DENSE["large"], DENSE["several blocks at once"]])
def test_fp8_sums_keep_so_many_bits(tile):
    rng = np.random.default_rng(7)
    m, n, k, bits = 72, 136, 512, 6
    a, b = e4m3(rng, 1, m, k), e4m3(rng, 1, n, k)
    a_scale, b_scale = scales(rng, k // 128, m), scales(rng, 1, 2, k // 128)
    out = interpreted(
        fp8_gemm, a, a_scale, b, b_scale, None, tile=dataclasses.replace(tile, sum_bits=bits), n=n,
        kind="dense", out_dtype=jnp.float32,
    )[0]  # fmt: skip
    fraction = np.frexp(np.asarray(out))[0] * 2.0 ** (bits + 1)
    assert (fraction == np.round(fraction)).all()
    expected = by_row(a[0], a_scale) @ by_block(b[0], b_scale[0]).T
    assert 2e-3 < apart(out, expected) < k // 128 * 2.0**-bits


@pytest.mark.parametrize("tile", [DENSE["large"], Tile(3, 128, 2, beside=2), Tile(2, 128, 2)])
def test_fp8_grouped(tile):
    rng = np.random.default_rng(1)
    n, k = 144, 256
    m, groups = sum(GROUPS) + 4, len(GROUPS)  # rows behind the groups
    a, b = e4m3(rng, 1, m, k), e4m3(rng, groups, n, k)
    a_scale, b_scale = scales(rng, k // 128, m), scales(rng, groups, -(-n // 128), k // 128)
    a_scale = a_scale.at[:, sum(GROUPS) :].set(jnp.nan)
    out = interpreted(
        fp8_gemm, a, a_scale, b, b_scale, jnp.array(GROUPS, jnp.int32), tile=tile, n=n,
        kind="grouped", out_dtype=jnp.bfloat16,
    )[0]  # fmt: skip
    ends = np.cumsum(GROUPS)
    rows = by_row(a[0], a_scale)
    for group, (end, size) in enumerate(zip(ends, GROUPS, strict=True)):
        inside = slice(end - size, end)
        expected = rows[inside] @ by_block(b[group], b_scale[group]).T
        assert apart(out[inside], expected) < ROUNDING


def test_fp8_masked():
    rng = np.random.default_rng(2)
    counts, m, n, k = [70, 0, 104], 104, 144, 256
    a, b = e4m3(rng, 3, m, k), e4m3(rng, 3, n, k)
    a_scale, b_scale = scales(rng, k // 128, 3 * m), scales(rng, 3, 2, k // 128)
    out = interpreted(
        fp8_gemm, a, a_scale, b, b_scale, jnp.array(counts, jnp.int32),
        tile=Tile(1, 64, 3, depth=2), n=n, kind="masked", out_dtype=jnp.bfloat16,
    )  # fmt: skip
    for group, count in enumerate(counts):
        rows = by_row(a[group], a_scale[:, group * m : (group + 1) * m])[:count]
        assert apart(out[group, :count], rows @ by_block(b[group], b_scale[group]).T) < ROUNDING


@pytest.mark.parametrize("sizes", [[70, 0, 200, 1], [0, 0, 0, 0], [512, 0, 0, 0]])
@pytest.mark.parametrize(
    ("more", "dtype"), [(False, jnp.float32), (True, jnp.float32), (False, jnp.bfloat16)]
)
def test_fp8_wgrad_of_groups(sizes, more, dtype):
    rng = np.random.default_rng(3)
    m, n, k = 72, 136, 640
    a, b = e4m3(rng, 1, m, k), e4m3(rng, 1, n, k)
    a_scale, b_scale = scales(rng, k // 128, m), scales(rng, k // 128, n)
    blocks = [-(-size // 128) for size in sizes]
    a_scale = a_scale.at[sum(blocks) :].set(jnp.nan)
    init = draw(rng, len(sizes), 128, 256) if more else None
    out = interpreted(
        fp8_gemm, a, a_scale, b, b_scale, jnp.array(sizes, jnp.int32), init,
        tile=sm90_tiles.BY_ROW, n=n, kind="k_grouped", out_dtype=dtype,
    )  # fmt: skip
    left, right = by_row(a[0], a_scale), by_row(b[0], b_scale)
    first = 0
    for group, count in enumerate(blocks):
        columns = slice(first * 128, (first + count) * 128)
        expected = left[:, columns] @ right[:, columns].T
        expected += np.asarray(init[group, :m, :n], np.float64) if more else 0
        assert apart(out[group], expected) < (SUMS if dtype == jnp.float32 else ROUNDING)
        first += count


def test_fp8_wgrad_adds_to_what_is_there():
    rng = np.random.default_rng(6)
    m, n, k = 200, 136, 256
    a, b, init = e4m3(rng, 1, m, k), e4m3(rng, 1, n, k), draw(rng, 1, 256, 256)
    a_scale, b_scale = scales(rng, k // 128, m), scales(rng, k // 128, n)
    out = interpreted(
        fp8_gemm, a, a_scale, b, b_scale, None, init, tile=sm90_tiles.BY_ROW, n=n, kind="dense",
        out_dtype=jnp.float32,
    )  # fmt: skip
    expected = by_row(a[0], a_scale) @ by_row(b[0], b_scale).T
    assert apart(out[0], expected + np.asarray(init[0, :m, :n], np.float64)) < SUMS


@pytest.mark.parametrize("tile", [Tile(2, 256, 2, below=2), Tile(2, 128, 3), Tile(1, 128, 3)])
def test_bf16(tile):
    rng = np.random.default_rng(4)
    m, n, k = sum(GROUPS) + 4, 272, 192
    a = draw(rng, 1, m, k).astype(jnp.bfloat16)
    b = draw(rng, len(GROUPS), n, k).astype(jnp.bfloat16)
    left, right = np.asarray(a[0], np.float64), np.asarray(b, np.float64)
    dense = interpreted(
        bf16_gemm, a, b[:1], None, tile=tile, n=n, kind="dense", out_dtype=jnp.float32
    )[0]  # fmt: skip
    assert apart(dense, left @ right[0].T) < SUMS
    b = jnp.pad(b, ((0, 0), (0, 48), (0, 0)))
    right = np.asarray(b, np.float64)
    grouped = interpreted(
        bf16_gemm, a, b.swapaxes(1, 2), jnp.array(GROUPS, jnp.int32), tile=tile, n=320,
        kind="grouped", b_by_k=True, out_dtype=jnp.bfloat16,
    )[0]  # fmt: skip
    for group, (end, size) in enumerate(zip(np.cumsum(GROUPS), GROUPS, strict=True)):
        inside = slice(end - size, end)
        assert apart(grouped[inside], left[inside] @ right[group].T) < ROUNDING


@pytest.mark.parametrize("sizes", [[70, 0, 1, 53, 0], [64, 64], [3, 130, 40]])
def test_bf16_wgrad_of_groups_that_start_anywhere(sizes):
    rng = np.random.default_rng(5)
    t = -(-sum(sizes) // 8) * 8 + 8
    x, dy = (draw(rng, t, width).astype(jnp.bfloat16) for width in (192, 320))
    x, dy = (array.at[sum(sizes) :].set(jnp.nan) for array in (x, dy))
    out = interpreted(
        bf16_grouped_wgrad, x, dy, jnp.array(sizes, jnp.int32), tile=Tile(2, 256, 3),
        n=320, out_dtype=jnp.float32,
    )  # fmt: skip
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    for group, (end, size) in enumerate(zip(np.cumsum(sizes), sizes, strict=True)):
        inside = slice(end - size, end)
        assert apart(out[group], x[inside].T @ dy[inside]) < SUMS


@pytest.mark.parametrize("m", [1, 8, 40, 64, 100, 128, 200, 4096])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (576, 7168), (2112, 7168), (24576, 1536)])
def test_tiles_fit_the_problem(m, n, k):
    blocks = k // 128
    dense = sm90_tiles.dense(m, n, blocks)
    assert blocks % (dense.splits * dense.depth) == 0
    assert dense.stages > dense.depth
    assert dense == sm90_tiles.dense(m, n, blocks)
    for choose in (sm90_tiles.grouped, sm90_tiles.masked):
        assert blocks % choose(m, n, blocks, 8).depth == 0


def shape(*sizes, dtype=jnp.float8_e4m3fn):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize(
    ("m", "n", "blocks"),
    [(1, 64, 1), (8, 7168, 128), (64, 7168, 128), (64, 24576, 12), (128, 4096, 56),
     (4096, 2112, 56), (4096, 7168, 128)],
)  # fmt: skip
def test_dense_lowers_for_cuda(m, n, blocks):
    """The interpreter looks neither at layouts nor at how much shared memory there is, and makes
    products in another way."""
    scales = shape(m, blocks, dtype=jnp.float32), shape(-(-n // 128), blocks, dtype=jnp.float32)
    a, b = shape(m, blocks * 128), shape(n, blocks * 128)
    traced = sm90_gemm.fp8_dense.trace(a, scales[0], b, scales[1], jnp.bfloat16)
    traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("rows", [1, 64, 100])
def test_few_rows_are_made_up_where_k_is_long(rows):
    assert sm90_gemm._spread(rows, 128) == max(rows, 64)
    assert sm90_gemm._spread(rows, 16) == rows


@pytest.mark.parametrize(
    ("n", "dtype"), [(16, jnp.bfloat16), (80, jnp.float32), (1024, jnp.bfloat16)]
)
def test_groups_lower_for_cuda(n, dtype):
    counts, f32 = shape(4, dtype=jnp.int32), jnp.float32
    b, b_scale = shape(4, n, 256), shape(4, -(-n // 128), 2, dtype=f32)
    grouped = shape(1000, 256), shape(1000, 2, dtype=f32), b, b_scale, counts, dtype
    masked = shape(4, 256, 256), shape(4, 256, 2, dtype=f32), b, b_scale, counts, dtype
    rows = shape(1000, 256, dtype=jnp.bfloat16), shape(4, n, 256, dtype=jnp.bfloat16), counts, dtype
    for function, operands in (
        (sm90_gemm.fp8_grouped, grouped), (sm90_gemm.fp8_masked, masked),
        (sm90_gemm.bf16_grouped, rows),
    ):  # fmt: skip
        function.trace(*operands).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weight_gradients_lower_for_cuda(dtype):
    columns = shape(80, 640), shape(80, 5, dtype=jnp.float32)
    more = shape(80, 80, dtype=jnp.float32) if dtype == jnp.float32 else None
    traced = sm90_gemm.fp8_wgrad.trace(*columns, *columns, more, dtype)
    traced.lower(lowering_platforms=("cuda",))
    sizes = shape(3, dtype=jnp.int32)
    traced = sm90_gemm.fp8_grouped_wgrad.trace(*columns, *columns, sizes, None, dtype)
    traced.lower(lowering_platforms=("cuda",))
