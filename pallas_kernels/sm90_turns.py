"""Turns: counters in global memory by which SMs add to the same place one after the other."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu

SCALAR = plgpu.Layout.WG_SPLAT


def await_turn(counters: Any, index: Any, turn: Any) -> None:
    """Wait until counters[index] is `turn`; what the SMs before have written is then in place."""
    _on_counter(
        counters, index, turn,
        "{ .reg .pred p; .reg .u32 v;"
        " WAIT: ld.acquire.gpu.global.u32 v, [$0]; setp.lt.u32 p, v, $1; @p bra WAIT;"
        " fence.proxy.async.global; }",
    )  # fmt: skip


def pass_turn(counters: Any, index: Any, turn: Any) -> None:
    """Let the next SM have its turn, once all this thread has stored by TMA is complete."""
    _on_counter(
        counters, index, turn,
        "{ .reg .pred p; .reg .u32 v; cp.async.bulk.wait_group 0; fence.proxy.async.global;"
        " add.u32 v, $1, 1; elect.sync _|p, 0xffffffff; @p st.release.gpu.global.u32 [$0], v; }",
    )  # fmt: skip


def _on_counter(counters: Any, index: Any, turn: Any, ptx: str) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def run(_: Any, counters: ir.Value, index: Any, turn: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        (index,), (turn,) = index.registers.flat, turn.registers.flat
        offset = arith.muli(arith.extsi(i64, index), utils.c(4, i64))
        address = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(counters)), offset)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [address, turn], ptx, "l,r", has_side_effects=True
        )

    run(counters, index, turn)
