"""Rows in another order on Hopper, and weighted sums of rows.

`gather` and `spread` only move memory. A persistent CTA of one warpgroup, of which several share an
SM, walks batches of rows; bulk copies bring them into a ring of shared memory and take them out
again, so that no row passes through registers. `gather` fetches single rows and stores batches,
`spread` fetches batches and stores single rows, each to all of its slots. Indices are read as
scalars, a batch or more before they are needed. Scales go beside that: `sm90_permute_scales`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend

from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.sm90_permute_scales import Batches, Gathered, Scalar, Spread, inside

SMEM_OF_SM, SMEM_RESERVED = 228 << 10, 2 << 10  # the latter a CTA: the driver's and barriers
MOST_ROWS, MOST_SLOTS = 16, 32  # indices that a batch takes
INSIDE, CLIPPED = plgpu.OOBFillMode.PROMISE_IN_BOUNDS, plgpu.OOBFillMode.UNDEFINED


class Ring(NamedTuple):
    """Bytes of a stage at most (but a row), stages of a CTA, CTAs an SM at most."""

    bytes: int = 16 << 10
    stages: int = 3
    ctas: int = 4


RING = Ring()


@lowered_once
def gather(
    x: jax.Array, rows: jax.Array, *, ring: Ring = RING, sms: int | None = None,
    interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`gather_rows` of operands that are not empty; a row of x is a multiple of 16 bytes."""
    return _gather("gather_rows", x, None, rows, ring, sms, interpret)[0]


@lowered_once
def gather_quantized(
    q: jax.Array, scale: jax.Array, rows: jax.Array, *, ring: Ring = RING, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`gather_quantized`, likewise."""
    q, scale = _gather("gather_quantized", q, scale.T, rows, ring, sms, interpret)
    return q, scale.T


@lowered_once
def spread(
    x: jax.Array, slots: jax.Array, *, ring: Ring = RING, sms: int | None = None,
    interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """`spread_rows`, likewise."""
    return _spread("spread_rows", x, None, slots, ring, sms, interpret)[0]


@lowered_once
def spread_quantized(
    q: jax.Array, scale: jax.Array, slots: jax.Array, *, ring: Ring = RING, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`spread_quantized`, likewise."""
    q, scale = _spread("spread_quantized", q, scale.T, slots, ring, sms, interpret)
    return q, scale.T


def _gather(
    name: str, x: jax.Array, scale: jax.Array | None, rows: jax.Array, ring: Ring,
    sms: int | None, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    batches = Batches(rows.size, _each(x, ring, MOST_ROWS))

    def body(refs: Any) -> None:
        def sources(i: Scalar) -> tuple[Scalar, ...]:
            return batches.indices(refs.indices, i)

        def fetch(i: Scalar, stage: Scalar, found: Sequence[Scalar]) -> None:
            for j, row in enumerate(found):
                row = refs.x.at[inside(row, x.shape[0])]
                copy = row, refs.x_s.at[stage, j], refs.full.at[stage]
                plgpu.copy_gmem_to_smem(*copy, oob_mode=INSIDE)

        def store(i: Scalar, stage: Scalar, _: Any) -> None:
            out = refs.out.at[pl.ds(batches.first(i), batches.each)]
            plgpu.copy_smem_to_gmem(refs.x_s.at[stage], out)  # clipped where the output ends

        scales = Gathered(batches, refs) if scale is not None else None
        _walk(batches, ring, refs.full, fetch, store, scales, sources=sources)

    return _launch(
        name, body, x, scale, rows, rows.size, batches, ring, batches.each, sms, interpret
    )


def _spread(
    name: str, x: jax.Array, scale: jax.Array | None, slots: jax.Array, ring: Ring,
    sms: int | None, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    tokens, choices = slots.shape
    batches = Batches(tokens, _each(x, ring, MOST_SLOTS // choices))

    def body(refs: Any) -> None:
        def targets(i: Scalar) -> tuple[Scalar, ...]:
            return batches.indices(refs.indices, i, choices)

        def fetch(i: Scalar, stage: Scalar, _: Any) -> None:
            rows = refs.x.at[pl.ds(batches.first(i), batches.each)]
            copy = rows, refs.x_s.at[stage], refs.full.at[stage]
            plgpu.copy_gmem_to_smem(*copy, oob_mode=CLIPPED)

        def store(i: Scalar, stage: Scalar, found: Sequence[Scalar]) -> None:
            for j in range(batches.each):
                own = found[j * choices : (j + 1) * choices]

                @pl.when(batches.first(i) + j < tokens)
                def _(j: int = j, own: Sequence[Scalar] = own) -> None:
                    for slot in own:
                        out = refs.out.at[inside(slot, slots.size)]
                        plgpu.copy_smem_to_gmem(refs.x_s.at[stage, j], out, commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        scales = Spread(batches, refs) if scale is not None else None
        _walk(batches, ring, refs.full, fetch, store, scales, targets=targets)

    return _launch(
        name, body, x, scale, slots.reshape(-1), slots.size, batches, ring, 1, sms, interpret
    )


def _none(_: Scalar) -> tuple[()]:
    return ()


def _walk(
    batches: Batches, ring: Ring, full: Any, fetch: Callable[..., None],
    store: Callable[..., None], scales: Any,
    sources: Callable[[Scalar], Any] = _none, targets: Callable[[Scalar], Any] = _none,
) -> None:  # fmt: skip
    """fetch(i, stage, sources(i)) and then store(i, stage, targets(i)) for this CTA's batches."""
    count, ahead = batches.own(), ring.stages - 1

    def start(i: Scalar, found: Any) -> None:
        run = functools.partial(fetch, i, lax.rem(i, jnp.int32(ring.stages)), found)
        pl.when(i < count)(run)

    def step(i: Scalar, carry: Any) -> Any:
        found, slots, moving = carry
        stage = lax.rem(i, jnp.int32(ring.stages))
        plgpu.barrier_wait(full.at[stage])
        store(i, stage, slots)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # batch i - 1 has left its stage
        start(i + ahead, found)
        moving = scales.step(i, moving) if scales else ()
        coming = sources(i + ring.stages), targets(i + 1)  # where the former were: no moves
        return *lax.optimization_barrier(coming), moving  # else they are loaded in the next step

    for i in range(ahead):
        start(jnp.int32(i), sources(jnp.int32(i)))
    first = jnp.int32(0)
    moving = scales.start() if scales else ()
    lax.fori_loop(0, count, step, (sources(first + ahead), targets(first), moving))
    plgpu.wait_smem_to_gmem(0)


def _each(x: jax.Array, ring: Ring, most: int) -> int:
    """Rows of a batch, a power of two."""
    fits = max(1, min(most, ring.bytes // _row_bytes(x)))
    return 1 << (fits.bit_length() - 1)


def _row_bytes(x: jax.Array) -> int:
    return x.shape[1] * x.dtype.itemsize


def _launch(
    name: str, body: Callable[[Any], None], x: jax.Array, scale: jax.Array | None,
    indices: jax.Array, out_rows: int, batches: Batches, ring: Ring, arrivals: int,
    sms: int | None, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    """Outputs of `out_rows` rows of x, and as many columns of scale if there is one."""
    operands = dict(x=x, indices=indices)
    out = dict(out=jax.ShapeDtypeStruct((out_rows, x.shape[1]), x.dtype))
    if scale is not None:
        operands["scale"] = scale
        out["scale_out"] = jax.ShapeDtypeStruct((scale.shape[0], out_rows), scale.dtype)

    def kernel(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*operands, *out), refs, strict=True))
        body(types.SimpleNamespace(**named, **scratch, on_device=interpret is None))

    size = ring.stages * batches.each * _row_bytes(x)
    ctas = max(1, min(ring.ctas, SMEM_OF_SM // (size + SMEM_RESERVED)))
    ctas *= sms or backend.get_default_device().core_count
    return plgpu.kernel(
        kernel, out_type=list(out.values()), grid=(min(batches.total, ctas),), grid_names=("cta",),
        scratch_types=dict(
            x_s=plgpu.SMEM((ring.stages, batches.each, x.shape[1]), x.dtype),
            full=plgpu.Barrier(num_arrivals=arrivals, num_barriers=ring.stages),
        ),
        kernel_name=name, interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())  # fmt: skip
