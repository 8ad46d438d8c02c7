"""What attention kernels do with registers that Pallas has no words for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm, nvvm
from jax.experimental.pallas import mosaic_gpu as plgpu

SCALAR, WGMMA = plgpu.Layout.WG_SPLAT, plgpu.Layout.WGMMA
SINGLE = fragmented_array.WGMMA_LAYOUT_ACC_32BIT  # a register an element, as WGMMA has them


def broadcast(vector: jax.Array, shape: tuple[int, ...], axis: int = 0) -> jax.Array:
    """A value a row (or, for axis 1, a column)."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def product(shape: tuple[int, int], issue: Callable[[Any], None]) -> jax.Array:
    """What the WGMMAs that `issue(accumulator)` starts add up to."""

    def run(accumulator: Any) -> jax.Array:
        issue(accumulator)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def opaque_zero(on_device: bool) -> jax.Array:
    """0 that the compiler cannot see through.

    LLVM moves what WGMMA needs to know of each slice of shared memory out of loops and then lacks
    registers; slices whose index holds this 0 stay where they are.
    """
    if not on_device:
        return jnp.int32(0)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.int32, SCALAR))
    def zero(_: Any) -> mgpu.FragmentedArray:
        i32 = ir.IntegerType.get_signless(32)
        found: Any = llvm.inline_asm(i32, [], "mov.u32 $0, 0;", "=r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return zero()


def for_wgmma(on_device: bool) -> None:
    """Let WGMMA see what this thread has written to shared memory, once it is told of it."""
    if not on_device:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()  # `commit_smem` would wait for all threads too
    def fence(_: Any) -> None:
        space = nvvm.SharedSpace.shared_cta
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=space)

    fence()


def rescale(sums: jax.Array, by: jax.Array, on_device: bool) -> jax.Array:
    """sums * by, a factor a row; warps whose factors are all 1 pass it over."""
    if not on_device:
        return sums * broadcast(by, sums.shape)

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, WGMMA),
    )
    def scale(_: Any, sums: Any, by: Any) -> mgpu.FragmentedArray:
        single = sums.to_layout(SINGLE)
        registers, factors = list(single.registers.flat), list(by.registers.flat)
        rows = [0 if i // 2 % 2 == 0 else 1 for i in range(len(registers))]
        lines = [f"mul.f32 ${i}, ${i}, ${len(registers) + rows[i]};" for i in range(len(registers))]
        ptx = (
            f"{{ .reg .pred p; setp.neu.f32 p, ${len(registers)}, 0f3F800000;"
            f" setp.neu.or.f32 p, ${len(registers) + 1}, 0f3F800000, p;"
            f" vote.sync.any.pred p, p, 0xffffffff; @!p bra DONE; {' '.join(lines)} DONE: }}"
        )
        kind = registers[0].type
        constraints = ["=f"] * len(registers) + ["f", "f"] + [str(i) for i in range(len(registers))]
        found: Any = llvm.inline_asm(
            llvm.StructType.get_literal([kind] * len(registers)), [*factors, *registers], ptx,
            ",".join(constraints), asm_dialect=0, has_side_effects=True,
        )  # fmt: skip
        new = [llvm.extractvalue(kind, found, [i]) for i in range(len(registers))]
        new = np.array(new).reshape(single.registers.shape)
        return mgpu.FragmentedArray(_registers=new, _layout=SINGLE, _is_signed=None).to_layout(
            sums.layout
        )

    return scale(sums, by)


def prefetch(array: Any) -> None:
    """Have L2 fetch a contiguous array, or part of one, from memory. Called by a whole warp."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def fetch(_: Any, array: ir.Value) -> None:
        kind = ir.MemRefType(array.type)
        size = math.prod(kind.shape) * utils.bytewidth(kind.element_type)
        i64 = ir.IntegerType.get_signless(64)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [llvm.ptrtoint(i64, utils.memref_ptr(array))],
            "{ .reg .pred p; elect.sync _|p, 0xffffffff;"
            f" @p cp.async.bulk.prefetch.L2.global [$0], {size}; }}",
            "l",
            has_side_effects=True,
        )

    fetch(array)


def opaque(values: jax.Array, on_device: bool) -> jax.Array:
    """The same values, of which the compiler does not know where they come from.

    Of bfloat16 made from float32 it would otherwise go back to the latter, and keep both.
    """
    if not on_device:
        return values

    @plgpu.inline_mgpu(
        arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct(values.shape, values.dtype, WGMMA)
    )
    def same(_: Any, values: Any) -> mgpu.FragmentedArray:
        return mgpu.optimization_barrier(values)

    return same(values)


def store_rows(out: Any, values: jax.Array, row: Any, left: Any, on_device: bool) -> None:
    """Store values [64], one a row of WGMMA's layout, from `row` on in `out` [rows] of global
    memory: the first `left` of them."""
    if not on_device:
        for i in range(values.shape[0]):

            @pl.when(i < left)
            def _(i: int = i) -> None:
                out[row + i] = values[i]

        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WGMMA.reduce(1), SCALAR, SCALAR))
    def store(_: Any, out: ir.Value, values: Any, row: Any, left: Any) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        (row,), (left,) = row.registers.flat, left.registers.flat
        base = llvm.ptrtoint(i64, utils.memref_ptr(out))
        indices = values.layout.thread_idxs(values.shape)
        for register, (index,) in zip(values.registers.flat, indices, strict=True):
            line = arith.index_cast(i32, index)
            offset = arith.muli(arith.extsi(i64, arith.addi(row, line)), utils.c(4, i64))
            kept = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.slt, line, left))
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [arith.addi(base, offset), utils.bitcast(register, i32), kept],
                "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.b32 [$0], $1; }",
                "l,r,r",
                has_side_effects=True,
            )

    store(out, values, row, left)
