"""Gradients of MLA's prefill and training attention on Hopper, in one pass over the scores.

* An SM works on 128 keys of a head, 64 a warpgroup, and walks the 64-query tiles that see them.
  Scores are made transposed, so that weights and their gradients are first operands in registers
  for dv and dk, whose sums take 160 registers of a thread and stay there.
* Gradients of the scores also go to shared memory, where both warpgroups make a part of dq's
  columns of them. A warp of its own adds those to dq in memory.
* Sums do not depend on chance: tiles of keys add to a tile of queries in turn, from the last that
  it sees to the first. All start at their diagonal, so each finds the one before it two steps
  ahead, and what it waits for has mostly happened. Units are dealt in an order in which none comes
  before one that it waits for. All CTAs must run at once for that, one an SM: a process that MPS
  lets use a part of them would wait for ever, and is refused.
"""

from __future__ import annotations

import functools
import os
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_mla_backward_steps import (
    CHUNK,
    DELTA,
    LSE,
    ROWS,
    STAGES,
    Call,
    Scalar,
    differentiate,
    slot_of,
    units,
)
from pallas_kernels.sm90_mla_backward_work import KEYS, QUERIES, Unit, Work
from pallas_kernels.sm90_tile import swizzled
from pallas_kernels.sm90_turns import await_turn, pass_turn


@functools.partial(jax.jit, static_argnames=("plain", "scale", "interpret", "sms"))
def backward(
    q: jax.Array, k: jax.Array, k_rope: jax.Array | None, v: jax.Array | None,
    low: jax.Array | None, high: jax.Array | None, plain: bool, out: jax.Array, lse: jax.Array,
    d_out: jax.Array, *, scale: float, d_lse: jax.Array | None = None, interpret: Any = None,
    sms: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:  # fmt: skip
    """(dq, dk, dk_rope, dv) of `sm90_mla_prefill.forward`, for operands padded as it wants them.

    Without v it is None, too: dk has the columns of k.
    """
    if interpret is None:
        _check_share()
    b, t, h, width = q.shape
    call = Call(
        heads=h, keys=k.shape[1], q=width, v=out.shape[-1], rope_apart=k_rope is not None,
        packed=v is None, scale=scale, plain=plain, on_device=interpret is None,
    )  # fmt: skip
    work = Work.of(low, high, b, h, t, k.shape[1], plain, sms)
    products = (out.astype(jnp.float32) * d_out).sum(-1)
    # The barrier keeps XLA from one slow kernel that sums up and transposes.
    delta = lax.optimization_barrier(products).swapaxes(1, 2)
    delta = delta if d_lse is None else delta - d_lse
    statistics = jnp.stack([lse * (-1 / scale), -delta], axis=2)
    dq, dk, d_rope, dv = _launch(call, q, k, k_rope, v, statistics, d_out, work, interpret)
    dq = dq * scale
    if work.seen is not None:
        dq = jnp.where(work.seen[:, :, None, None], dq, 0)
    if d_rope is not None:
        d_rope = d_rope.astype(jnp.float32).sum(2).astype(q.dtype)
    return dq.astype(q.dtype), dk, d_rope, dv


def _check_share() -> None:
    name = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    if os.environ.get(name, "100") not in ("", "100"):
        raise ValueError(
            f"{name} is {os.environ[name]}: expected 100 or none, as this kernel's blocks wait for "
            'one another on all SMs at once; take backend="reference" in such a process'
        )


def _launch(
    call: Call, q: jax.Array, k: jax.Array, k_rope: jax.Array | None, v: jax.Array | None,
    statistics: jax.Array, d_out: jax.Array, work: Work, interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:  # fmt: skip
    b, t, h, _ = q.shape
    operands = dict(q=q, k=k, k_rope=k_rope, v=v, statistics=statistics, d_out=d_out, **work.arrays)
    given = {name: x for name, x in operands.items() if x is not None}
    turns = jax.new_ref(jnp.zeros((b * h * (t // QUERIES),), jnp.int32))
    keys = (b, k.shape[1], h)
    outputs = dict(
        dq=jax.ShapeDtypeStruct((b, t, h, call.q), jnp.float32),
        dk=jax.ShapeDtypeStruct((*keys, k.shape[-1]), q.dtype),
    )
    if v is not None:
        outputs["dv"] = jax.ShapeDtypeStruct((*keys, call.v), q.dtype)
    if call.rope:
        outputs["d_rope"] = jax.ShapeDtypeStruct((*keys, call.rope), q.dtype)

    def kernel(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*given, "turns", *outputs), refs, strict=True))
        _run(call, types.SimpleNamespace(**named, **scratch))

    found = plgpu.kernel(
        kernel,
        out_type=tuple(outputs.values()),
        scratch_types=_scratch(call),
        grid=(work.ctas,),
        grid_names=("cta",),
        num_threads=3 if call.on_device else 4,
        thread_name="wg",
        kernel_name="mla_backward",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )(*given.values(), turns)
    named = dict(zip(outputs, found, strict=True))
    return named["dq"], named["dk"], named.get("d_rope"), named.get("dv")


def _scratch(call: Call) -> dict[str, Any]:
    bf16, f32 = jnp.bfloat16, jnp.float32
    return dict(
        k_s=swizzled((2 * call.chunks, ROWS, CHUNK), bf16),
        v_s=swizzled((2, ROWS, call.v), bf16),
        q_s=swizzled((STAGES, QUERIES, call.q), bf16),
        d_out_s=swizzled((STAGES, QUERIES, call.v), bf16),
        ds_s=swizzled((2, ROWS, QUERIES), bf16),
        dq_s=swizzled((call.chunks, QUERIES, CHUNK), f32),
        statistics_s=plgpu.SMEM((2 * STAGES, QUERIES), f32),
        keys_full=plgpu.Barrier(num_arrivals=2 * call.chunks + 2),
        keys_empty=plgpu.Barrier(num_arrivals=2),
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        d_out_full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        ds_full=plgpu.Barrier(num_arrivals=2),
        ds_empty=plgpu.Barrier(num_arrivals=2),
        dq_full=plgpu.Barrier(num_barriers=call.chunks),
        own_empty=plgpu.Barrier(num_barriers=2),
        shared_empty=plgpu.Barrier(num_barriers=2),
    )


def _run(call: Call, refs: Any) -> None:
    wg = lax.axis_index("wg")
    fetch, add = (functools.partial(f, call, refs) for f in (_fetch_all, _add_all))

    # One code for both warpgroups, before the others': two keep ptxas from using all registers.
    @pl.when(wg < 2)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        total = units(call, refs, functools.partial(differentiate, call, refs, wg))

        @pl.when(total > 0)  # the last phases
        def _() -> None:
            if call.chunks > 1:
                plgpu.barrier_wait(refs.own_empty.at[wg])
            if call.shared is not None:
                last = functools.partial(plgpu.barrier_wait, refs.shared_empty.at[wg])
                pl.when(lax.rem(total, jnp.int32(2)) == wg)(last)

    @pl.when(wg >= 2)
    def _() -> None:
        if not call.on_device:
            pl.when(wg == 2)(fetch)
            pl.when(wg == 3)(add)
            return
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp: Scalar) -> None:
            pl.when(warp == 0)(fetch)
            pl.when(warp == 1)(add)


# --- fetching and adding ----------------------------------------------------------------------


def _fetch_all(call: Call, refs: Any) -> None:
    total = units(call, refs, functools.partial(_fetch, call, refs))
    plgpu.barrier_wait(refs.keys_empty)

    @pl.loop(lax.max(jnp.int32(0), total - STAGES), total)
    def _(step: Scalar) -> None:
        plgpu.barrier_wait(refs.empty.at[slot_of(step)])


def _fetch(call: Call, refs: Any, unit: Unit, number: Scalar, done: Scalar) -> None:
    pl.when(number > 0)(functools.partial(plgpu.barrier_wait, refs.keys_empty))
    at = unit.batch, unit.head
    for half in range(2):
        rows = pl.ds(unit.tile * KEYS + half * ROWS, ROWS)
        for chunk in range(call.chunks):
            if call.rope and chunk == call.chunks - 1:
                keys = refs.k_rope.at[at[0], rows]
            else:
                keys = refs.k.at[at[0], rows, at[1], pl.ds(chunk * CHUNK, CHUNK)]
            place = refs.k_s.at[half * call.chunks + chunk]
            plgpu.copy_gmem_to_smem(keys, place, refs.keys_full)
        v_ref, columns = call.values_in(refs.k, getattr(refs, "v", None))
        values = v_ref.at[at[0], rows, at[1], columns]
        plgpu.copy_gmem_to_smem(values, refs.v_s.at[half], refs.keys_full)

    def step(i: Scalar, _: None) -> None:
        slot = slot_of(done + i)
        pl.when(done + i >= STAGES)(functools.partial(plgpu.barrier_wait, refs.empty.at[slot]))
        rows = pl.ds((unit.first + i) * QUERIES, QUERIES)
        for source, place, row, full in (
            (refs.q, refs.q_s, LSE, refs.q_full),
            (refs.d_out, refs.d_out_s, DELTA, refs.d_out_full),
        ):
            plgpu.copy_gmem_to_smem(source.at[at[0], rows, at[1]], place.at[slot], full.at[slot])
            statistic = refs.statistics.at[at[0], at[1], row, rows]
            plgpu.copy_gmem_to_smem(statistic, refs.statistics_s.at[2 * slot + row], full.at[slot])

    lax.fori_loop(0, unit.count, step, None)


def _add_all(call: Call, refs: Any) -> None:
    units(call, refs, functools.partial(_add, call, refs))


def _add(call: Call, refs: Any, unit: Unit, number: Scalar, done: Scalar) -> None:
    """Add a unit's parts of dq, tile by tile, when it is its turn."""

    def step(i: Scalar, _: None) -> None:
        tile = unit.first + i
        last = tile // 2 if call.plain else refs.last[unit.batch, tile] - 1
        turn = last - unit.tile
        counter = (unit.batch * call.heads + unit.head) * (refs.q.shape[1] // QUERIES) + tile
        if call.on_device:
            await_turn(refs.turns, counter, turn)
        rows = pl.ds(tile * QUERIES, QUERIES)
        for chunk in range(call.chunks):
            plgpu.barrier_wait(refs.dq_full.at[chunk])
            columns = pl.ds(chunk * CHUNK, CHUNK)
            place = refs.dq.at[unit.batch, rows, unit.head, columns]
            if not call.on_device:
                before = jnp.where(turn == 0, 0.0, place[...])
                place[...] = before + refs.dq_s[chunk]
            else:
                store = functools.partial(plgpu.copy_smem_to_gmem, refs.dq_s.at[chunk], place)
                pl.when(turn == 0)(store)
                pl.when(turn > 0)(functools.partial(store, reduction_op="add"))
        if call.on_device:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        freed = [refs.own_empty.at[wg] for wg in range(2)] if call.chunks > 1 else []
        if call.shared is not None:  # for whose turn comes next
            freed.append(refs.shared_empty.at[lax.rem(done + i + 1, jnp.int32(2))])
        for barrier in freed:
            plgpu.barrier_arrive(barrier)
        if call.on_device:
            pass_turn(refs.turns, counter, turn)

    lax.fori_loop(0, unit.count, step, None)
