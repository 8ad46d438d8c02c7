"""Attention of many queries on Hopper, forward: bf16 operands, softmax and sums in float32.

A persistent CTA works on tiles of 128 queries. Each of its two multiplying warpgroups has 64 of
them; one warp fetches keys and values in tiles of 128, from the last that the queries see to the
first, through a ring of shared memory that is never drained between tiles. A step issues S = Q K^T
of the next tile of keys and O += P V of the one before together, so that the softmax of one
warpgroup runs under the products of the other: named barriers hand the tensor cores over
("ping-pong", FlashAttention-3, arXiv 2407.08608). The first S of a tile of queries goes out with
the last P V of the tile before.

A query sees one interval of keys. Tiles of keys that all 128 queries see take no mask. With a
shared rotary key (`k_rope`) both parts of K are fetched on their own and S is the sum of two
products, so that no copy of the rotary key is made for every head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_mla_schedule as schedule
from pallas_kernels.sm90_mla_rows import ROWS, STAGED, WARPGROUPS, Refs, Rows, Scalar, Shape, turn
from pallas_kernels.sm90_mla_schedule import TILE
from pallas_kernels.sm90_tile import swizzled

REGISTERS = (240, 24)  # of a multiplying and a fetching thread
SETUP = 1.5  # what a unit costs beside its tiles of keys, in such tiles


@functools.partial(jax.jit, static_argnames=("plain", "scale", "interpret", "sms"))
def forward(
    q: jax.Array,
    k: jax.Array,
    k_rope: jax.Array | None,
    v: jax.Array | None,
    low: jax.Array | None,
    high: jax.Array | None,
    plain: bool,
    *,
    scale: float,
    interpret: Any = None,
    sms: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out [b, t, h, v], lse [b, h, t]) of q [b, t, h, q], k [b, s, h, q - r], k_rope [b, s, r] and
    v [b, s, h, v], t and s multiples of 128; query i sees keys [low, high)[b, i]. Without v k is
    [b, s, h, q - r + v], the values behind the keys.

    `plain` means causal with t == s in one piece: low and high are not looked at.
    """
    b, t, h, width = q.shape
    rope = 0 if k_rope is None else k_rope.shape[-1]
    columns = k.shape[-1] if v is None else k.shape[-1] + v.shape[-1]
    values = columns - (width - rope)
    sms = sms or schedule.sm_count()
    operands = dict(q=q, k=k, k_rope=k_rope, v=v)
    if plain:
        operands["table"] = _plain_table(q, columns, sms)
    elif low is None or high is None:
        raise ValueError("low and high are missing: only plain attention does without")
    else:
        operands["table"] = schedule.device_table(schedule.ranges(low, high), h, sms)
        operands["ends"] = jnp.stack([low, high], 1)
    given = {name: x for name, x in operands.items() if x is not None}
    how = Shape(
        heads=h, tiles=t // TILE, width=width, rope=rope, values=values, packed=v is None,
        scale=scale, plain=plain, on_device=interpret is None,
    )  # fmt: skip

    def kernel(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*given, "out", "lse"), refs, strict=True))
        _run(how, Refs(**named, **scratch))

    return plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((b, t, h, values), q.dtype),
            jax.ShapeDtypeStruct((b, h, t), jnp.float32),
        ),
        scratch_types=_scratch(how),
        grid=(given["table"].shape[0],),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name="mla_forward",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*given.values())


def _plain_table(q: jax.Array, columns: int, sms: int) -> jax.Array:
    """Of causal attention: a tile of queries sees the tiles of keys up to its own."""
    b, t, h, _ = q.shape
    group = schedule.group_of(t, columns)
    table = schedule.static_table(b * h, t // TILE, group, lambda tile: tile + 1 + SETUP, sms)
    return jnp.asarray(table)


def _scratch(how: Shape) -> dict[str, Any]:
    stages, bf16 = how.stages, jnp.bfloat16
    found = dict(
        q_s=swizzled((WARPGROUPS, ROWS, how.width), bf16),
        k_s=swizzled((stages, TILE, how.width - how.rope), bf16),
        v_s=swizzled((stages, TILE, how.values), bf16),
        out_s=swizzled((WARPGROUPS, ROWS, STAGED), bf16),
        q_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        q_empty=plgpu.Barrier(num_barriers=WARPGROUPS),
        k_full=plgpu.Barrier(num_arrivals=2 if how.rope else 1, num_barriers=stages),
        k_empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        v_empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )
    return found | (dict(rope_s=swizzled((stages, TILE, how.rope), bf16)) if how.rope else {})


def _run(how: Shape, refs: Refs) -> None:
    wg = lax.axis_index("wg")

    # Before the others' code: what both compute is not kept in registers behind the long part.
    @pl.when(wg == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        fetch = functools.partial(_fetch, how, refs)
        if how.on_device:  # one warp: others would take issue slots to no purpose
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(fetch))
        else:
            fetch()

    @pl.when(wg < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        if how.on_device:
            _take_turns(how, refs, wg)
        else:
            Rows(how, refs, wg, None).attend()


def _take_turns(how: Shape, refs: Refs, wg: Scalar) -> None:
    """Run a warpgroup's rows; the first warpgroup has the first turn."""

    @pl.when(wg == 1)
    def _() -> None:
        turn("arrive", jnp.int32(0))

    def run(sums_ref: Any) -> None:
        Rows(how, refs, wg, sums_ref).attend()

    pl.run_scoped(run, plgpu.ACC((ROWS, how.values), jnp.float32))

    @pl.when(wg == 0)
    def _() -> None:
        turn("sync", jnp.int32(0))  # the turn handed over last


def _fetch(how: Shape, refs: Refs) -> None:
    """Bring what the units need, in the order in which the warpgroups use it."""
    count = how.count(refs)

    def load(step: Scalar, empty: Any, *copies: tuple[Any, Any, Any]) -> None:
        slot = how.slot(step)

        @pl.when(step >= how.stages)
        def _() -> None:
            plgpu.barrier_wait(empty.at[slot])

        for source, smem, full in copies:
            plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])

    def unit(number: Scalar, carry: tuple) -> tuple:
        first, words = carry
        after = how.read(refs, number + 1)
        unit = how.unit(words)
        at = unit.batch, unit.head

        def rows(i: Scalar) -> Any:
            return pl.ds((unit.last - 1 - i) * TILE, TILE)

        own = how.width - how.rope
        v_ref, behind = (refs.k, own) if how.packed else (refs.v, 0)

        def load_keys(i: Scalar) -> None:
            keys = refs.k.at[at[0], rows(i), at[1], pl.ds(0, own)]
            copies = [(keys, refs.k_s, refs.k_full)]
            if how.rope:
                copies.append((refs.k_rope.at[at[0], rows(i)], refs.rope_s, refs.k_full))
            load(first + i, refs.k_empty, *copies)

        def step(i: Scalar, _: None) -> None:
            pl.when(i + 1 < unit.count)(functools.partial(load_keys, i + 1))
            values = v_ref.at[at[0], rows(i), at[1], pl.ds(behind, how.values)]
            load(first + i, refs.v_empty, (values, refs.v_s, refs.v_full))

        load_keys(0)
        for wg in range(WARPGROUPS):
            pl.when(number > 0)(functools.partial(plgpu.barrier_wait, refs.q_empty.at[wg]))
            queries = refs.q.at[at[0], pl.ds(unit.tile * TILE + wg * ROWS, ROWS), at[1]]
            plgpu.copy_gmem_to_smem(queries, refs.q_s.at[wg], refs.q_full.at[wg])
        lax.fori_loop(0, unit.count, step, None)
        return first + unit.count, after

    total, _ = lax.fori_loop(0, count, unit, (jnp.int32(0), how.read(refs, 0)))
    for wg in range(WARPGROUPS):
        plgpu.barrier_wait(refs.q_empty.at[wg])

    @pl.loop(lax.max(jnp.int32(0), total - how.stages), total)
    def _(step: Scalar) -> None:
        plgpu.barrier_wait(refs.k_empty.at[how.slot(step)])
        plgpu.barrier_wait(refs.v_empty.at[how.slot(step)])
