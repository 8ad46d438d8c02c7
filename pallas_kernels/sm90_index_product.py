"""What the lightning indexer's two kernels share: their launch, and keys times heads.

A product has 64 keys as rows and the heads of a few queries as columns, all 128 of K at once, so
that relu, weights and the sum over heads stay within four threads.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_wgmma
from pallas_kernels.sm90_launch import Refs
from pallas_kernels.sm90_quantize import piece_layout
from pallas_kernels.sm90_tile import ROWS

WIDTH = 128  # of an indexer head, in e4m3 elements as in bytes
COLUMNS = 128  # of a product, at most
E4M3 = jnp.float8_e4m3fn
PER_KEY, PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
SWIZZLED = (plgpu.SwizzleTransform(WIDTH),)  # ty: ignore[abstract-class-instantiation]
REGISTERS = {1: None, 2: (240, 24), 3: (160, 32), 4: (120, 24)}  # multiplying, fetching, a thread
Scalar = Any


class Kernel(Protocol):
    """The static side of a kernel; its methods are traced inside it."""

    def fetch(self, refs: Refs) -> None: ...

    def multiply(self, refs: Refs, wg: Scalar) -> None: ...

    def scratch(self) -> dict[str, Any]: ...


def launch(
    kernel: Kernel, name: str, operands: dict[str, jax.Array], out: jax.ShapeDtypeStruct,
    warpgroups: int, ctas: int, interpret: Any,
) -> jax.Array:  # fmt: skip
    """Fetch in one warp and multiply in the warpgroups; refs carry the operands' names, and out."""

    def body(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*operands, "out"), refs, strict=True))
        _run(kernel, Refs(**named, **scratch, on_device=interpret is None), warpgroups)

    return plgpu.kernel(
        body, out_type=out, scratch_types=kernel.scratch(), grid=(ctas,), grid_names=("cta",),
        num_threads=warpgroups + 1, thread_name="wg", kernel_name=name, interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values())  # fmt: skip


def _run(kernel: Kernel, refs: Refs, warpgroups: int) -> None:
    wg = lax.axis_index("wg")
    registers = REGISTERS[warpgroups]
    if refs.on_device:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()

    @pl.when(wg < warpgroups)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[0], action="increase")
        kernel.multiply(refs, wg)

    @pl.when(wg == warpgroups)
    def _() -> None:
        if registers:
            plgpu.set_max_registers(registers[1], action="decrease")
        fetch = functools.partial(kernel.fetch, refs)
        if refs.on_device:
            plgpu.warp_map(lambda warp: pl.when(warp == 0)(fetch))
        else:
            fetch()


def rows_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of rows of 128 bytes, swizzled as WGMMA likes it. Unlike tiles of 8 rows, which
    would look the same, TMA fills it from any row on."""
    return plgpu.SMEM(shape, dtype, transforms=SWIZZLED)


def product(
    refs: Refs, keys: tuple[Any, Scalar, Scalar], columns: tuple[Any, Scalar, int, int]
) -> jax.Array:
    """Of 64 keys at (shared memory, slot, row) and the columns at (shared memory, slot, row,
    count). It is not to be touched before `finished`."""
    (k_smem, k_slot, k_row), (q_smem, q_slot, q_row, count) = keys, columns
    if refs.on_device:
        unset = plgpu.layout_cast(jnp.zeros((ROWS, count), jnp.float32), plgpu.Layout.WGMMA)
        k, q = _address(k_smem, k_slot, k_row), _address(q_smem, q_slot, q_row)
        return sm90_wgmma.start(unset, k, q)

    def run(acc: Any) -> jax.Array:
        k = k_smem.at[k_slot, pl.ds(k_row, ROWS)]
        plgpu.wgmma(acc, k, q_smem.at[q_slot, pl.ds(q_row, count)].T)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, count), jnp.float32))


def finished(refs: Refs, acc: jax.Array, left: int = 0) -> jax.Array:
    """The product, once all but the `left` started last have arrived."""
    return sm90_wgmma.end(acc, left) if refs.on_device else acc


def _address(smem: Any, slot: Scalar, row: Scalar) -> jax.Array:
    """Of a row of `rows_smem`, in units of 16 bytes."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(SWIZZLED),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=sm90_wgmma.SCALAR),
    )
    def first(_: Any, smem: ir.Value) -> mgpu.FragmentedArray:
        i32 = ir.IntegerType.get_signless(32)
        bytes_ = llvm.ptrtoint(i32, utils.memref_ptr(smem))
        units = arith.shrui(bytes_, arith.constant(i32, 4))
        return mgpu.FragmentedArray.splat(units, (), is_signed=True)

    return first(smem) + (slot * smem.shape[-2] + row) * sm90_wgmma.ROW


def over_heads(acc: jax.Array, weights: jax.Array, heads: int) -> list[jax.Array]:
    """sum_h weights[h] * relu(acc[:, h]) for each query."""
    terms = jnp.maximum(acc, 0) * lax.broadcast_in_dim(weights, acc.shape, [1])
    return [jnp.sum(terms[:, i : i + heads], axis=1) for i in range(0, acc.shape[1], heads)]


def numbered(first: Scalar) -> jax.Array:
    """Numbers of 64 keys."""
    return first + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_KEY)


def nothing() -> jax.Array:
    """-inf for 64 keys."""
    return plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), piece_layout(ROWS))


def write(ref: Any, value: jax.Array) -> None:
    ref[...] = value


def drain(empty: Any, slots: int, total: Scalar) -> None:
    """Wait for the last readers."""

    @pl.loop(lax.max(jnp.int32(0), total - slots), total)
    def _(step: Scalar) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(slots))])
