"""Writes into the paged latent cache on Hopper: norm, rotation, quantisation, scatter.

A CTA of one warpgroup writes one token, or a few where there are many. All of their reads start at
once: of the rows, and as scalars of the positions and then the pages. A warp holds a tile of the
latent, 4 elements a thread, and a quarter of the key's pairs; words of 4 and 8 bytes go from
registers straight to the page. Only the sum of squares passes through shared memory.

The cache is a mutable array: XLA aliases the kernel's result to its operand, so that a donated
cache is not copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import in_place
from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.latent_cache import (
    BYTES,
    KEY,
    KEY_AT,
    LATENT,
    PAGE,
    PAIRS,
    SCALES_AT,
    TILE,
    TILES,
    WIDTH,
    power_of_two_scale,
)

MANY, TOGETHER = 1024, 4  # of more tokens than the card has room for a CTA writes several
WORD = 4  # elements of the latent that a thread holds, and bytes that it stores
PAGE_BITS = PAGE.bit_length() - 1
Scalar = Any
Read = tuple[jax.Array, ...]  # of a token: its latent [4, 128], the pairs of its key [32, 2]

spare, tiled = plgpu.Replicated, plgpu.Layout.TILED
ROWS = tiled(plgpu.Tiling(((TILES, TILE), (WORD,))), (-3,), (-2,), -1)  # [4, 128]: a row a warp
SCALES = tiled(plgpu.Tiling(((TILES, WORD),)), (-2,), (spare(32),), -1)  # [4, 4]: likewise


def pairs_layout(width: int) -> Any:
    """Of [32, width]: a row a thread, the same for four threads of a warp."""
    return tiled(plgpu.Tiling(((PAIRS, width), (8, width))), (-4,), (-2, spare(4)), -1)


class Place(NamedTuple):
    exists: Scalar
    page: Scalar
    row: Scalar


def quantize(cache: jax.Array, *, together: int | None = None, interpret: Any = None) -> jax.Array:
    """`quantize_latent_cache` of a cache that is not empty."""
    pages = cache.shape[0]
    walk = Walk("quantize_latent_cache", pages * PAGE, together, interpret)

    def body(rows: Any, out: Any) -> None:
        def place(token: Scalar) -> Place:
            return Place(True, token >> PAGE_BITS, token & (PAGE - 1))

        walk.visit(out, place, lambda token: walk.read(rows.at[token]))

    out = jax.ShapeDtypeStruct((pages, PAGE, BYTES), jnp.uint8)
    return walk.launch(body, cache.reshape(-1, WIDTH), out=[out])[0]


def append(
    cache: jax.Array, new: jax.Array, block_table: jax.Array, positions: jax.Array, *,
    together: int | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`append_latents`, of things that are not empty."""
    walk = Walk("append_latents", positions.size, together, interpret)

    def body(out: Any, positions_ref: Any, table: Any, rows: Any) -> None:
        place = paged(out, table, positions_ref)
        walk.visit(out, place, lambda token: walk.read(rows.at[token]))

    operands = positions.reshape(-1), block_table, new.reshape(-1, WIDTH)
    return walk.launch_in_place(cache, body, *operands)


def write(
    cache: jax.Array, down: jax.Array, norm_weight: jax.Array, turn: jax.Array,
    block_table: jax.Array, positions: jax.Array, *, eps: float,
    together: int | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`write_latents`, of things that are not empty."""
    walk = Walk("write_latents", positions.size, together, interpret)

    def body(out, positions_ref, table, rows, turn_ref, weight_ref):
        weight = plgpu.load(weight_ref, layout=ROWS, optimized=False).astype(jnp.float32)

        def read(token: Scalar) -> Read:
            layout = pairs_layout(2)
            turn = plgpu.load(turn_ref.at[token], layout=layout, optimized=False)
            return *walk.read(rows.at[token]), turn

        def finish(latent: jax.Array, key: jax.Array, turn: jax.Array) -> Read:
            return normed(latent, weight, eps), turned(key, turn)

        walk.visit(out, paged(out, table, positions_ref), read, finish)

    return walk.launch_in_place(
        cache, body, positions.reshape(-1), block_table, down.reshape(-1, WIDTH),
        turn.reshape(-1, PAIRS, 2), norm_weight.reshape(TILES, TILE),
    )  # fmt: skip


def paged(cache: Any, table: Any, positions: Any) -> Callable[[Scalar], Place]:
    """The place of every token, by references to the table [b, max_pages] and positions [b * t]."""
    requests, most = table.shape
    each = positions.shape[0] // requests

    def place(token: Scalar) -> Place:
        position = positions[token]
        slot = position >> PAGE_BITS
        page = table[lax.div(token, jnp.int32(each)), lax.clamp(jnp.int32(0), slot, most - 1)]
        exists = (slot >= 0) & (slot < most) & (page >= 0) & (page < cache.shape[0])
        return Place(exists, page, position & (PAGE - 1))

    return place


def normed(latent: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of [4, 128], all of it one row."""
    wide = latent.astype(jnp.float32)
    squares = jnp.sum(jnp.sum(wide * wide, axis=1), axis=0)
    return (wide * lax.rsqrt(squares * (1 / LATENT) + eps) * weight).astype(latent.dtype)


def turned(key: jax.Array, turn: jax.Array) -> jax.Array:
    """The pairs [32, 2] turned by their (cos, sin), float32 [32, 2]."""
    even, odd, cos, sin = (column(x, i) for x in (key.astype(jnp.float32), turn) for i in (0, 1))
    parts = even * cos - odd * sin, even * sin + odd * cos
    first, second = (lax.broadcast_in_dim(x.astype(key.dtype), key.shape, [0]) for x in parts)
    return jnp.where(columns(2) == 0, first, second)


def column(pairs: jax.Array, which: int) -> jax.Array:
    """[32] of float32 [32, 2]: a sum in integers, for a thread an element that it holds."""
    bits = lax.bitcast_convert_type(pairs, jnp.int32)
    return lax.bitcast_convert_type(
        jnp.sum(jnp.where(columns(2) == which, bits, 0), axis=1), jnp.float32
    )


def columns(width: int) -> jax.Array:
    """Their numbers, int32 [32, width]."""
    numbers = lax.broadcasted_iota(jnp.int32, (PAIRS, width), 1)
    return plgpu.layout_cast(numbers, pairs_layout(width))


def written(latent: jax.Array, key: jax.Array, dtype: Any) -> dict[int, jax.Array]:
    """A token as it lies in a cache of that dtype: its parts by where they start."""
    if dtype != jnp.uint8:
        return {0: latent, LATENT: key}
    values, scales = quantized(latent)
    scales, key = bytes_of(scales, SCALES), bytes_of(words_of(key), pairs_layout(WORD))
    return {0: values, SCALES_AT: scales, KEY_AT: key}


def quantized(latent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bytes [4, 128] of e4m3 and the bits of the scales, int32 [4]."""
    wide = latent.astype(jnp.float32)
    scale, inverse = power_of_two_scale(jnp.max(jnp.abs(wide), axis=1))
    values = (wide * lax.broadcast_in_dim(inverse, wide.shape, [0])).astype(E4M3)
    return lax.bitcast_convert_type(values, jnp.uint8), lax.bitcast_convert_type(scale, jnp.int32)


def words_of(key: jax.Array) -> jax.Array:
    """int32 [32] of bfloat16 [32, 2], little end first."""
    bits = lax.bitcast_convert_type(key, jnp.uint16).astype(jnp.int32)
    return jnp.sum(bits << 16 * columns(2), axis=1)


def bytes_of(words: jax.Array, layout: Any) -> jax.Array:
    """uint8 [n, 4] of int32 [n], little end first."""
    shape = (*words.shape, WORD)
    which = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 1), layout)
    return (lax.broadcast_in_dim(words, shape, [0]) >> (8 * which) & 0xFF).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Walk:
    """Over all tokens; a CTA takes `together` of them, which None leaves to their number."""

    name: str
    tokens: int
    together: int | None
    interpret: Any

    @property
    def step(self) -> int:
        return self.together or (TOGETHER if self.tokens > MANY else 1)

    def launch(self, body: Callable[..., None], *operands: Any, out: Any = ()) -> Any:
        return plgpu.kernel(
            body, out_type=out, grid=(ceil_div(self.tokens, self.step),), grid_names=("cta",),
            kernel_name=self.name, interpret=self.interpret,
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        )(*operands)  # fmt: skip

    def launch_in_place(
        self, cache: jax.Array, body: Callable[..., None], *operands: jax.Array
    ) -> jax.Array:
        """The cache after the kernel, whose first reference it is."""
        ref = in_place.borrow(cache)
        self.launch(body, ref, *operands)
        return in_place.give_back(ref)

    def visit(
        self,
        out: Any,
        place: Callable[[Scalar], Place],
        read: Callable[[Scalar], Read],
        finish: Callable[..., Read] = lambda *token: token,
    ) -> None:
        """What a CTA does: finish(*read(token)) goes to its place in `out`."""
        first = lax.axis_index("cta") * self.step
        tokens = [first + i for i in range(self.step)]
        inside = [lax.min(token, self.tokens - 1) for token in tokens]
        places = [place(token) for token in inside]
        # Without it the compiler puts reads behind the branch that needs them.
        loaded = lax.optimization_barrier([read(token) for token in inside])
        for token, at, values in zip(tokens, places, loaded, strict=True):
            parts = written(*finish(*values), out.dtype)
            store = functools.partial(self.put, out.at[at.page, at.row], parts)
            pl.when(at.exists & (token < self.tokens))(store)

    def read(self, row: Any) -> Read:
        """Of a reference [576]."""
        latent = self.get(row.at[pl.ds(0, LATENT)], (TILES, TILE), ROWS)
        return latent, self.get(row.at[pl.ds(LATENT, KEY)], (PAIRS, 2), pairs_layout(2))

    def get(self, ref: Any, shape: tuple[int, ...], layout: Any) -> jax.Array:
        if self.interpret:  # knows no references of another shape
            return ref[...].reshape(shape)
        return plgpu.load(ref.reshape(*shape), layout=layout, optimized=False)

    def put(self, row: Any, parts: dict[int, jax.Array]) -> None:
        """Every part to the elements of `row` from its start on."""
        for start, values in parts.items():
            ref = row.at[pl.ds(start, values.size)]
            if self.interpret:
                ref[...] = values.reshape(ref.shape)
            else:
                ref.reshape(*values.shape)[...] = values
