"""Sums up the pieces of requests that paged decode has split, in place of what it left open.

A warpgroup takes a row at a time and reads several of its pieces at once, whose way to L2 is what
the time goes to.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import in_place
from pallas_kernels.sm90_mla_plan import Plan

MOST_AT_ONCE = 16
CTAS = 8  # an SM
LN2 = math.log(2)
LOWEST = -1e30  # as in `sm90_mla_steps`: what a row without keys has for its sums' logarithm


def combine(
    out: jax.Array, lse: jax.Array, part_out: jax.Array, part_lse: jax.Array, plan: Plan,
    *, sms: int, interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """out [b, rows, 512] and lse [b, rows] with the split requests' rows, of what `decode` gave."""
    b, rows = lse.shape
    width = out.shape[-1]
    usual = max(2, plan.parts // b)  # pieces of requests of equal lengths
    at_once = min(MOST_AT_ONCE, 1 << math.ceil(math.log2(usual)))
    grid = min(sms * CTAS, plan.parts * rows)
    layout = plgpu.Layout.WG_STRIDED((width,), width // 128)

    def kernel(part_out, part_lse, splits, count, out, lse):
        cta, of_rows = lax.axis_index("cta"), jnp.int32(rows)

        def split_of(unit: Any) -> tuple[Any, ...]:
            at = lax.min(lax.div(unit, of_rows), jnp.int32(plan.parts - 1))
            return tuple(splits[at, k] for k in range(3))

        # The next kernel may take the SMs that this one leaves at once. The plan may be read before
        # `decode` is done, which was given all of it and started this kernel after its own wait.
        # One CTA at least stays until then: what follows relies on all before this kernel, too.
        if interpret is None:
            plgpu.griddepcontrol_launch_dependents()
        units, first_split = count[0] * rows, split_of(cta)
        if interpret is None:
            pl.when((cta < units) | (cta == 0))(plgpu.griddepcontrol_wait)

        def row(i: Any, now: tuple[Any, ...]) -> tuple[Any, ...]:
            unit = cta + i * grid
            row, upcoming = lax.rem(unit, of_rows), split_of(unit + grid)
            request, first, last = now

            def some(chunk: Any, carry: Any) -> Any:
                sums, total, highest = carry
                found = []
                for k in range(at_once):
                    part = first + chunk * at_once + k
                    taken = lax.min(part, last)
                    slot = 2 * taken + lax.convert_element_type(taken == first, jnp.int32)
                    power = lax.select(part <= last, part_lse[slot, row], jnp.float32(-jnp.inf))
                    piece = plgpu.load(part_out.at[slot, row], layout=layout, optimized=False)
                    found.append((power, piece))
                higher = highest
                for power, _ in found:
                    higher = lax.max(higher, power)
                by = jnp.exp2(highest - higher)
                sums, total = sums * by, total * by
                for power, piece in found:
                    weight = jnp.exp2(power - higher)
                    sums, total = sums + piece * weight, total + weight
                return sums, total, higher

            zeros = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
            start = (zeros, jnp.float32(0), jnp.float32(2 * LOWEST))
            chunks = lax.div(last - first + at_once, jnp.int32(at_once))
            sums, total, highest = lax.fori_loop(0, chunks, some, start)
            out.at[request, row][...] = (sums / total).astype(out.dtype)
            seen = (highest + jnp.log2(total)) * LN2
            lse[request, row] = lax.select(highest > LOWEST / 2, seen, jnp.float32(jnp.inf))
            return upcoming

        some = lax.div(lax.max(units - cta, 0) + (grid - 1), jnp.int32(grid))
        lax.fori_loop(0, some, row, first_split)

    places = in_place.borrow(out), in_place.borrow(lse)
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(grid,),
        grid_names=("cta",),
        kernel_name="mla_combine",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(part_out, part_lse, plan.splits, plan.count, *places)
    out, lse = (in_place.give_back(place) for place in places)
    return out[:, :rows], lse
