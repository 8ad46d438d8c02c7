"""Quantisation along rows on Hopper: 1 x 128 tiles, SwiGLU in front.

These kernels only move memory. A persistent CTA of one warpgroup walks tiles of 128 x 128, along K
first; TMA fetches the next ones while it works, fills what lies outside the array with zeros and
clips the stores. Two or three such CTAs share an SM. A thread holds 16-byte pieces of rows, so the
lanes of half a warp (or of a whole one, in float32) share a row; the rows' largest magnitudes go
through shared memory, and every thread computes one row's scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.quantize import TILE, tile_scale
from pallas_kernels.sm90_tile import keep_row_major, pieces

WARPS, LANES = 4, 32
SMEM_OF_SM, SMEM_RESERVED = 228 << 10, 5 << 10  # the latter a CTA: the driver's, barriers, scratch
STAGE_BYTES = 64 << 10  # of x that a CTA keeps in shared memory
Scalar = Any
Count = int | Scalar  # TILE itself where every tile is known to be whole
LINE = plgpu.Layout.WG_STRIDED((TILE,), 1)  # of [128]: one element a thread


@lowered_once
def tiles(
    x: jax.Array, *, power_of_two: bool, sms: int | None = None, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """`quantize_tiles` of x [M, K], K % 16 == 0."""

    def cast(parts: list[jax.Array]) -> jax.Array:
        return parts[0]

    return _rows(x[:, None], cast, power_of_two, "quantize_tiles", sms, interpret)


@lowered_once
def swiglu(
    gate_up: jax.Array, *, power_of_two: bool, sms: int | None = None, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """`swiglu_quantize` of gate_up [M, 2F], F % 16 == 0."""
    m, width = gate_up.shape

    def product(parts: list[jax.Array]) -> jax.Array:
        return silu_times(*parts)

    halves = gate_up.reshape(m, 2, width // 2)
    return _rows(halves, product, power_of_two, "swiglu_quantize", sms, interpret)


def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in float32."""
    gate = gate.astype(jnp.float32)
    return gate / (1 + jnp.exp(-gate)) * up.astype(jnp.float32)


def _rows(
    x: jax.Array, combine: Callable[[list[jax.Array]], jax.Array], power_of_two: bool,
    name: str, sms: int | None, interpret: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Quantise combine([x[:, 0], x[:, 1], ...]) of x [M, parts, K] in 1 x 128 tiles."""
    m, parts, k = x.shape
    cols = ceil_div(k, TILE)
    layout = rows_layout(x.dtype)

    def body(x_ref, q_ref, scale_ref, x_s, q_s, line_s, full):
        def locate(unit, cursor):
            return (lax.div(unit, jnp.int32(cols)) * TILE, lax.rem(unit, jnp.int32(cols))), cursor

        def fetch(place, slot):
            row, col = place
            for part in range(parts):
                source = x_ref.at[pl.ds(row, TILE), part, pl.ds(col * TILE, TILE)]
                plgpu.copy_gmem_to_smem(source, x_s.at[slot, part], full.at[slot])

        def work(place, slot, refill):
            row, col = place
            plgpu.barrier_wait(full.at[slot])
            loaded = [plgpu.load(x_s.at[slot, part], layout=layout) for part in range(parts)]
            refill()
            q, scale = quantize_rows(combine(loaded), line_s, layout, power_of_two)
            write_tile(q, q_s)
            plgpu.copy_smem_to_gmem(q_s, q_ref.at[pl.ds(row, TILE), pl.ds(col * TILE, TILE)])
            store_line(
                scale, line_s.at[0], count_from(row, m),
                lambda start, size: scale_ref.at[col, pl.ds(row + start, size)],
            )  # fmt: skip

        if interpret is None:
            keep_row_major(x_s, q_s)
        stream(units, stages, fetch, work, locate)

    units = ceil_div(m, TILE) * cols
    stages = stages_of(parts * x.dtype.itemsize, STAGE_BYTES)
    q, scale = launch(
        body, x, name=name, units=units, sms=sms, interpret=interpret,
        out=[jax.ShapeDtypeStruct((m, k), E4M3), jax.ShapeDtypeStruct((cols, m), jnp.float32)],
        smem=dict(
            x_s=((stages, parts, TILE, TILE), x.dtype), q_s=((TILE, TILE), E4M3),
            line_s=((2, TILE), jnp.float32),
        ),
        full=plgpu.Barrier(num_arrivals=parts, num_barriers=stages),
    )  # fmt: skip
    return q, scale.T


def quantize_rows(
    x: jax.Array, line_s: Any, layout: Any, power_of_two: bool, alike: bool = False
) -> tuple[jax.Array, jax.Array]:
    """e4m3 [128, 128] in x's layout, scales [128] one a thread, for `alike` of the whole block.

    line_s is float32 [2, 128].
    """
    line_s[0] = jnp.max(jnp.abs(x), axis=1).astype(jnp.float32)
    amax = plgpu.load(line_s.at[0], layout=LINE)
    if alike:
        amax = plgpu.layout_cast(lax.broadcast(jnp.max(amax), (TILE,)), LINE)
    scale, inverse = tile_scale(amax, power_of_two)
    line_s[1] = inverse
    inverse = plgpu.load(line_s.at[1], layout=layout.reduce(1))
    scaled = x.astype(jnp.float32) * lax.broadcast_in_dim(inverse, x.shape, [0])
    return scaled.astype(E4M3), scale


def write_tile(q: jax.Array, q_s: Any) -> None:
    """q in q_s, ready to be copied, once earlier stores have left q_s."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    q_s[...] = q
    plgpu.commit_smem()


def count_from(start: Scalar, size: int) -> Count:
    """How many of `size` the tile of 128 from `start` on holds."""
    return TILE if size % TILE == 0 else lax.min(jnp.int32(TILE), size - start)


def _whole_or(valid: Count, whole: Callable[[], None], part: Callable[[], None]) -> None:
    """One of the two; Mosaic takes long over the parts, which are left out where they can be."""
    if isinstance(valid, int):
        whole()
        return
    pl.when(valid == TILE)(whole)
    pl.when(valid < TILE)(part)


def store_rows(q_s: Any, valid: Count, q_ref: Any, start: Scalar, col: Scalar) -> None:
    """The first `valid` rows of q_s to tile `col` of the rows from `start`, after a commit_smem."""

    def store(first: Scalar, size: int) -> None:
        if size == 1:
            store_row(q_s, q_ref, first, start, col * TILE)
            return
        out = q_ref.at[pl.ds(start + first, size), pl.ds(col * TILE, TILE)]
        plgpu.copy_smem_to_gmem(q_s.at[pl.ds(first, size)], out)

    _whole_or(valid, lambda: store(0, TILE), lambda: pieces(valid, TILE // 2, store))


def store_row(smem: Any, out: Any, which: Scalar, row: Scalar, col: Scalar) -> None:
    """Row `which` of smem to columns `col` on of row `row + which` of `out`, as far as those reach.

    What lies in one run in `out`, as a single row does, Mosaic copies as a run of bytes: nothing
    clips those at the end of a row.
    """
    line = smem.shape[1]
    width = lax.clamp(jnp.int32(0), out.shape[1] - col, jnp.int32(line))

    def copy(first: Scalar, size: int) -> None:
        plgpu.copy_smem_to_gmem(
            smem.at[pl.ds(which, 1), pl.ds(first, size)],
            out.at[pl.ds(row + which, 1), pl.ds(col + first, size)],
        )

    pieces(width, line, copy, least=16 // smem.dtype.itemsize)


def store_line(
    line: jax.Array, scratch: Any, valid: Count, at: Callable[[Scalar, int], Any]
) -> None:
    """The first `valid` elements of `line` [128] go to `at(start, size)`, references in parts."""

    def whole() -> None:
        at(0, TILE)[...] = line

    def part() -> None:
        scratch[...] = line

        def store(start: Scalar, size: int) -> None:
            if size == 1:
                at(start, 1)[0] = scratch[start]
            else:
                piece = plgpu.load(scratch.at[pl.ds(start, size)], layout=piece_layout(size))
                at(start, size)[...] = piece

        pieces(valid, TILE // 2, store)

    _whole_or(valid, whole, part)


def rows_layout(dtype: Any) -> Any:
    """Of [128, 128]: every thread holds 16-byte pieces of rows, in the order of shared memory."""
    piece = 16 // jnp.dtype(dtype).itemsize
    rows = LANES * piece // TILE  # that a warp holds at a time
    if rows == 1:
        return plgpu.Layout.TILED(plgpu.Tiling(((WARPS, TILE), (piece,))), (-3,), (-2,), -1)
    tiling = plgpu.Tiling(((WARPS * rows, TILE), (rows, TILE), (piece,)))
    return plgpu.Layout.TILED(tiling, (-5,), (-3, -2), -1)


def piece_layout(size: int) -> Any:
    """Of [size], 2 to 64 and a power of two: one element a thread, repeated."""
    spare = plgpu.Replicated
    if size > LANES:
        tiles, warps, lanes = ((size,), (LANES,), (1,)), (-3, spare(WARPS * LANES // size)), (-2,)
    elif size == LANES:
        tiles, warps, lanes = ((size,), (1,)), (spare(WARPS),), (-2,)
    else:
        tiles, warps, lanes = ((size,), (1,)), (spare(WARPS),), (-2, spare(LANES // size))
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warps, lanes, -1)


def launch(
    body: Callable[..., None], *operands: jax.Array, name: str, units: int, out: list[Any],
    smem: dict[str, tuple[tuple[int, ...], Any]], full: plgpu.Barrier, sms: int | None,
    interpret: Any, most_ctas: int = 2,
) -> Any:  # fmt: skip
    """Run `body` in as many CTAs of one warpgroup as fit the card at once, `units` at most.

    smem holds shapes and dtypes. Registers limit an SM to `most_ctas`: 3 if a thread needs 168.
    """
    size = sum(jnp.dtype(dtype).itemsize * math.prod(shape) for shape, dtype in smem.values())
    ctas = min(most_ctas, SMEM_OF_SM // (size + SMEM_RESERVED))
    ctas *= sms or backend.get_default_device().core_count
    refs = {key: plgpu.SMEM(*of) for key, of in smem.items()}
    return plgpu.kernel(
        body, out_type=out, scratch_types=dict(refs, full=full), grid=(min(units, ctas),),
        grid_names=("cta",), kernel_name=name, interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)  # fmt: skip


def stages_of(itemsize: int, most_bytes: int) -> int:
    """Stages of 128 x 128 elements, of that size together, within the bytes: at least one."""
    return max(1, min(2, most_bytes // (TILE * TILE * itemsize)))


def stream(
    units: Scalar,
    stages: int,
    fetch: Callable[[Any, Scalar], None],
    work: Callable[[Any, Scalar, Callable[[], None]], None],
    locate: Callable[[Scalar, Any], tuple[Any, Any]],
    cursor: Any = (),
    parts: int = 1,
) -> None:
    """Walk this CTA's units with up to `stages` fetches under way.

    locate(unit, cursor) gives the unit's place and the next cursor, fetch(place, slot) starts its
    copies, and work(place, slot, refill) calls refill() once it no longer reads the slot. A unit
    may be fetched in several `parts`, one behind the other: their numbers are the places' last.
    """
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")
    count = lax.div(units - cta + ctas - 1, jnp.int32(ctas)) * parts

    def at(i: Scalar, cursor: Any) -> tuple[Any, Any]:
        if parts == 1:
            return locate(cta + i * ctas, cursor)
        place, cursor = locate(cta + lax.div(i, jnp.int32(parts)) * ctas, cursor)
        return (*place, lax.rem(i, jnp.int32(parts))), cursor

    places = ()
    for i in range(stages):
        place, cursor = at(jnp.int32(i), cursor)
        places = (*places, place)
        pl.when(i < count)(functools.partial(fetch, place, i))

    def step(i: Scalar, carry: Any) -> Any:
        places, cursor = carry
        slot = lax.rem(i, jnp.int32(stages))
        place, cursor = at(i + stages, cursor)

        def refill() -> None:
            plgpu.commit_smem()
            pl.when(i + stages < count)(functools.partial(fetch, place, slot))

        work(places[0], slot, refill)
        return (*places[1:], place), cursor

    lax.fori_loop(0, count, step, (places, cursor))
    plgpu.wait_smem_to_gmem(0)
