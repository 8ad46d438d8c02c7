"""The elementwise part of SwiGLU's backward pass on Hopper, from one read of its operands.

The walk is that of `sm90_quantize`, over the tiles of gate, up and h at the same place. A unit has
only a few rows: a thread then needs so few registers that four CTAs share an SM. Sums along a row
are kept by tile and added up behind the kernel, always in the same order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.checks import E4M3, ceil_div
from pallas_kernels.quantize import TILE
from pallas_kernels.sm90_quantize import launch, rows_layout, stream
from pallas_kernels.sm90_tile import keep_row_major

ROWS, STAGES, CTAS = 16, 3, 4
FLOATS = 4  # in 16 bytes: TMA takes rows of whole 16 bytes,
LINE = 32  # and writes shared memory from the start of such a line of 128 bytes


def backward(
    q: jax.Array, scale: jax.Array, d_h: jax.Array, weights: jax.Array | None, *,
    rows: int = ROWS, stages: int = STAGES, most_ctas: int = CTAS, sms: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """gate_up's gradient [M, 2F], h [M, F] times the weights, and the weights' gradient [M].

    q [M, 2F] and scale are `quantize_tiles` of gate_up, d_h bfloat16 [M, F], F % 128 == 0. A unit
    has 8, 16, 24 or 32 rows.
    """
    m, f = d_h.shape
    cols, units_down = f // TILE, ceil_div(m, rows)
    weighted = weights is not None
    layout = rows_layout(d_h.dtype)

    def body(q_ref, scale_ref, d_h_ref, *refs, q_s, scale_s, d_h_s, grad_s, h_s, full, **more):
        weights_ref = refs[:weighted]
        grad_ref, h_ref, *sums_ref = refs[weighted:]

        def locate(unit, cursor):
            return (lax.div(unit, jnp.int32(cols)) * rows, lax.rem(unit, jnp.int32(cols))), cursor

        def fetch(place, slot):
            row, col = place
            down, across = pl.ds(row, rows), pl.ds(col * TILE, TILE)

            def copy(source, to):
                plgpu.copy_gmem_to_smem(source, to, full.at[slot])

            copy(q_ref.at[down, :, across], q_s.at[slot])
            copy(scale_ref.at[:, col, down], scale_s.at[slot, pl.ds(0, 2)])
            copy(d_h_ref.at[down, across], d_h_s.at[slot])
            for ref in weights_ref:
                copy(ref.at[down], weights_at(slot))

        def weights_at(slot):
            return more["weights_s"].at[slot, pl.ds(0, rows)]

        def by_row(ref):
            line = plgpu.load(ref, layout=layout.reduce(1))
            return lax.broadcast_in_dim(line, (rows, TILE), [0])

        def work(place, slot, refill):
            row, col = place
            plgpu.barrier_wait(full.at[slot])
            gate, up = (plgpu.load(q_s.at[slot, :, i], layout=layout) for i in range(2))
            gate_scale, up_scale = (by_row(scale_s.at[slot, i]) for i in range(2))
            d_h = plgpu.load(d_h_s.at[slot], layout=layout)
            weight = by_row(weights_at(slot)) if weighted else None
            refill()
            gate, up = gate.astype(jnp.float32) * gate_scale, up.astype(jnp.float32) * up_scale
            d_gate, d_up, h, sums = _gradients(gate, up, d_h.astype(jnp.float32), weight)
            for ref in sums_ref:
                ref[col, pl.ds(row, rows)] = sums
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            grad_s[:, 0] = d_gate.astype(grad_s.dtype)
            grad_s[:, 1] = d_up.astype(grad_s.dtype)
            h_s[...] = h.astype(h_s.dtype)
            plgpu.commit_smem()
            down, across = pl.ds(row, rows), pl.ds(col * TILE, TILE)
            plgpu.copy_smem_to_gmem(grad_s, grad_ref.at[down, :, across])
            plgpu.copy_smem_to_gmem(h_s, h_ref.at[down, across])

        keep_row_major(q_s, d_h_s, grad_s, h_s)
        stream(units_down * cols, stages, fetch, work, locate)

    out = [jax.ShapeDtypeStruct((m, 2, f), d_h.dtype), jax.ShapeDtypeStruct((m, f), d_h.dtype)]
    smem: dict[str, tuple[tuple[int, ...], Any]] = dict(
        q_s=((stages, rows, 2, TILE), E4M3), scale_s=((stages, 4, rows), jnp.float32),
        d_h_s=((stages, rows, TILE), d_h.dtype), grad_s=((rows, 2, TILE), d_h.dtype),
        h_s=((rows, TILE), d_h.dtype),
    )  # fmt: skip
    operands = [q.reshape(m, 2, f), _padded(scale.T).reshape(2, cols, -1), d_h]
    if weighted:
        operands.append(_padded(weights))
        out.append(jax.ShapeDtypeStruct((cols, units_down * rows), jnp.float32))
        smem["weights_s"] = ((stages, LINE), jnp.float32)
    grad, h, *sums = launch(
        body, *operands, name="swiglu_backward", units=units_down * cols, sms=sms,
        interpret=interpret, most_ctas=most_ctas, out=out, smem=smem,
        full=plgpu.Barrier(num_arrivals=len(operands), num_barriers=stages),
    )  # fmt: skip
    return grad.reshape(m, 2 * f), h, sums[0].sum(axis=0)[:m] if weighted else None


def _gradients(
    gate: jax.Array, up: jax.Array, d_h: jax.Array, weight: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Of gate and up, then h times the weight, and the rows' sums of d_h * h without it."""
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    h = silu * up
    sums = None
    if weight is not None:
        sums = jnp.sum(d_h * h, axis=1)
        d_h, h = d_h * weight, h * weight
    return d_h * up * (sigmoid + silu * (1 - sigmoid)), d_h * silu, h, sums


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, (*((0, 0) for _ in x.shape[1:]), (0, -x.shape[-1] % FLOATS)))
