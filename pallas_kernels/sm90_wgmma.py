"""An FP8 product of 64 rows into registers of the caller's choice.

`plgpu.wgmma` adds to an accumulator that starts as zeros in registers of its own. The compilers
may then start a product while the sums of the one before still wait to be made, and spill when
registers lack for both. Here a product overwrites the accumulator of the one before, and `settle`
has sums made before it starts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm, nvvm
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_tile import transforms

ROW = 128 // 16  # of shared memory, in the units of addresses here: 16 bytes
K = 32  # of one instruction, in bytes as in e4m3 elements
# What a descriptor says beside its address: a swizzle over 128 bytes, and 8 rows in 64 units.
SWIZZLED = (1 << 62) | (64 << 32)
WGMMA, SCALAR = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT
SINGLE = fragmented_array.WGMMA_LAYOUT_ACC_32BIT  # a register an element, as the instruction asks


def address(ref: Any) -> jax.Array:
    """Of shared memory [..., rows, 128 bytes], swizzled over 128 bytes; rows are `ROW` apart."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms(128, 128)),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR),
    )
    def of(_: Any, ref: ir.Value) -> mgpu.FragmentedArray:
        i32 = ir.IntegerType.get_signless(32)
        bytes_ = llvm.ptrtoint(i32, utils.memref_ptr(ref))
        units = arith.shrui(bytes_, arith.constant(i32, 4))
        return mgpu.FragmentedArray.splat(units, (), is_signed=True)

    return of(ref)


def start(old: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """e4m3 [64, 128] at address a times [n, 128] at b, transposed, in place of `old` [64, n].

    It is not to be touched before `end`.
    """

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct(old.shape, jnp.float32, layout=WGMMA),
    )
    def product(_: Any, old: Any, a: Any, b: Any) -> mgpu.FragmentedArray:
        single = mgpu.optimization_barrier(old.to_layout(SINGLE))
        (a,), (b,) = a.registers.flat, b.registers.flat
        nvvm.wgmma_fence_aligned()
        registers = list(single.registers.flat)
        for i in range(128 // K):
            at = (_descriptor(address, i * K // 16) for address in (a, b))
            registers = _wgmma(registers, *at, add=i > 0)
        nvvm.wgmma_commit_group_sync_aligned()
        new = np.array(registers).reshape(single.registers.shape)
        return mgpu.FragmentedArray(_registers=new, _layout=SINGLE, _is_signed=None).to_layout(
            old.layout
        )

    return product(old, a, b)


def end(flying: jax.Array, left: int = 0) -> jax.Array:
    """The product, once all but the `left` started last have arrived."""
    return _pinned(flying, left)


def settle(array: jax.Array) -> jax.Array:
    """The array, made before any product that starts later."""
    return _pinned(array, None)


def _pinned(array: jax.Array, left: int | None) -> jax.Array:
    @plgpu.inline_mgpu(
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(array.shape, jnp.float32, layout=WGMMA),
    )
    def pin(_: Any, array: Any) -> mgpu.FragmentedArray:
        if left is not None:
            nvvm.wgmma_wait_group_sync_aligned(left)
        return mgpu.optimization_barrier(array.to_layout(SINGLE)).to_layout(array.layout)

    return pin(array)


def _descriptor(address: ir.Value, offset: int) -> ir.Value:
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    moved = arith.addi(address, arith.constant(i32, offset)) if offset else address
    return arith.ori(arith.extui(i64, moved), arith.constant(i64, SWIZZLED))


def _wgmma(registers: list[ir.Value], a: ir.Value, b: ir.Value, *, add: bool) -> list[ir.Value]:
    count = len(registers)
    out = ", ".join(f"${i}" for i in range(count))
    a_at, b_at, add_at = (f"${2 * count + i}" for i in range(3))
    ptx = (
        f"{{ .reg .pred p; setp.ne.b32 p, {add_at}, 0; wgmma.mma_async.sync.aligned"
        f".m64n{2 * count}k{K}.f32.e4m3.e4m3 {{{out}}}, {a_at}, {b_at}, p, 1, 1; }}"
    )
    constraints = ",".join([*["=f"] * count, *map(str, range(count)), "l", "l", "n"])
    flag = llvm.mlir_constant(ir.IntegerAttr.get(ir.IntegerType.get_signless(32), int(add)))
    kind = registers[0].type
    found: Any = llvm.inline_asm(
        llvm.StructType.get_literal([kind] * count), [*registers, a, b, flag], ptx, constraints,
        asm_dialect=0, has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(kind, found, [i]) for i in range(count)]
