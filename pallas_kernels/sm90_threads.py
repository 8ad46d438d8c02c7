"""Instructions of single threads of a warpgroup, for work to which Pallas's layouts do not fit.

Values are MLIR's: 32-bit integers, a register each, and 64-bit addresses of global memory. Steps
that must stay where they are written (memory, shuffles) are marked as having side effects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = plgpu.Layout.WG_STRIDED((128,), 1)  # a register a thread
WARP = "0xffffffff"


def pairs(count: int) -> Any:
    """Layout of so many pairs of registers a thread."""
    return plgpu.Layout.WG_STRIDED((2 * 128 * count,), 2)


# --- values ------------------------------------------------------------------------------------


def i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def const(value: int | ir.Value) -> ir.Value:
    return value if isinstance(value, ir.Value) else utils.c(value, i32())


def add(x: ir.Value, y: int | ir.Value) -> ir.Value:
    return arith.addi(x, const(y))


def times(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, const(y))


def bits(x: ir.Value, y: int) -> ir.Value:
    return arith.andi(x, const(y))


def xor(x: ir.Value, y: int | ir.Value) -> ir.Value:
    return arith.xori(x, const(y))


def down(x: ir.Value, y: int) -> ir.Value:
    return arith.shrui(x, const(y))


def less(x: int | ir.Value, y: int | ir.Value) -> ir.Value:
    """Of signed numbers."""
    return arith.cmpi(arith.CmpIPredicate.slt, const(x), const(y))


def within(x: ir.Value, count: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ult, x, const(count))


def choose(condition: ir.Value, x: int | ir.Value, y: int | ir.Value) -> ir.Value:
    return arith.select(condition, const(x), const(y))


def thread(anew: bool = False) -> tuple[ir.Value, ir.Value]:
    """(warp, lane) in the warpgroup; `anew`: what comes of them is not to be held in registers."""
    number = utils.thread_idx()
    if anew:
        number = ptx("mov.b32 $0, $1;", "=r,r", number, outputs=1)
    return bits(down(number, 5), 3), bits(number, 31)


def shared(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def memory(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def onward(address: ir.Value, count: ir.Value) -> ir.Value:
    """The address so many (not negative) bytes on."""
    return arith.addi(address, arith.extui(i64(), count))


def row(address: ir.Value, number: ir.Value, size: int) -> ir.Value:
    """Where the row with that number lies, of rows of so many bytes."""
    return arith.addi(address, arith.muli(arith.extsi(i64(), number), utils.c(size, i64())))


def array(registers: Sequence[ir.Value | Sequence[ir.Value]]) -> mgpu.FragmentedArray:
    """Of single registers a thread, or of pairs."""
    count, first = len(registers), registers[0]
    width = 1 if isinstance(first, ir.Value) else len(first)
    vectors = [_vector([x] if isinstance(x, ir.Value) else x) for x in registers]
    return mgpu.FragmentedArray(
        _registers=np.array(vectors), _is_signed=True,
        _layout=mgpu.WGStridedFragLayout((width * 128 * count,), width),
    )  # fmt: skip


def registers(values: Any) -> list[Any]:
    """What `array` was made of; the register itself of a scalar."""
    found = list(values.registers.flat)
    if not isinstance(found[0].type, ir.VectorType):
        return found
    count = ir.VectorType(found[0].type).shape[0]
    split = [[llvm.extractelement(x, const(i)) for i in range(count)] for x in found]
    return [x[0] if count == 1 else x for x in split]


def _vector(words: Sequence[ir.Value]) -> ir.Value:
    found = llvm.mlir_undef(ir.VectorType.get((len(words),), i32()))
    for i, word in enumerate(words):
        found = llvm.insertelement(found, word, const(i))
    return found


# --- instructions ------------------------------------------------------------------------------


def ptx(text: str, constraints: str = "", *inputs: ir.Value, outputs: int = 0) -> Any:
    """Instructions that stay where they are; `constraints` of outputs, then of inputs."""
    return _asm(text, constraints, inputs, outputs, True)


def pure(text: str, constraints: str, *inputs: ir.Value) -> Any:
    """Instructions with one output that depend on nothing but their inputs."""
    return _asm(text, constraints, inputs, 1, False)


def _asm(
    text: str, constraints: str, inputs: Sequence[ir.Value], outputs: int, effects: bool
) -> Any:
    kind = (
        ir.Type.parse("!llvm.void") if not outputs
        else i32() if outputs == 1
        else llvm.StructType.get_literal([i32()] * outputs)
    )  # fmt: skip
    found: Any = llvm.inline_asm(kind, list(inputs), text, constraints, has_side_effects=effects)
    if outputs < 2:
        return found
    return [llvm.extractvalue(i32(), found, [i]) for i in range(outputs)]


def shuffle(value: ir.Value, lane: int | ir.Value, width: int = 32) -> ir.Value:
    """What that lane holds, counted in the own group of `width` lanes."""
    text = f"shfl.sync.idx.b32 $0, $1, $2, {(32 - width) << 8 | 31}, {WARP};"
    if isinstance(lane, int):
        return ptx(text.replace("$2", str(lane)), "=r,r", value, outputs=1)
    return ptx(text, "=r,r,r", value, lane, outputs=1)


def first_of(value: ir.Value) -> ir.Value:
    """The value of the first lane in which it is not negative, or else that of lane 0."""
    return ptx(
        "{ .reg .pred p; .reg .b32 m; setp.ge.s32 p, $1, 0;"
        f" vote.sync.ballot.b32 m, p, {WARP}; brev.b32 m, m; clz.b32 m, m; and.b32 m, m, 31;"
        f" shfl.sync.idx.b32 $0, $1, m, 31, {WARP}; }}",
        "=&r,r", value, outputs=1,
    )  # fmt: skip


def here(x: ir.Value, y: ir.Value) -> ir.Value:
    """x + y, to be added where it is written: moved out of loops, many of them would be held."""
    return ptx("add.u32 $0, $1, $2;", "=r,r,r", x, y, outputs=1)


def load(address: ir.Value, at: int = 0) -> ir.Value:
    return ptx(f"ld.global.b32 $0, [$1 + {at}];", "=r,l", address, outputs=1)


def in_order() -> None:
    """No access to memory moves past this, as ptxas would have loads do."""
    ptx(f"bar.warp.sync {WARP};")


def load_pair(address: ir.Value, at: int = 0) -> list[ir.Value]:
    """8 bytes that are wanted once, by this thread only."""
    text = f"ld.global.L1::no_allocate.v2.b32 {{$0, $1}}, [$2 + {at}];"
    return ptx(text, "=r,=r,l", address, outputs=2)


def load_if(there: ir.Value, address: ir.Value, at: int = 0) -> ir.Value:
    """A word, or 0 where `there` is 0."""
    return ptx(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0;"
        f" @p ld.global.b32 $0, [$1 + {at}]; }}",
        "=&r,l,r", address, there, outputs=1,
    )  # fmt: skip


def copy(to: ir.Value, to_at: int, address: ir.Value, at: int, count: ir.Value) -> None:
    """Start to copy `count` bytes to shared memory and to fill them up to 16 with zeros."""
    text = f"cp.async.cg.shared.global [$0 + {to_at}], [$1 + {at}], 16, $2;"
    ptx(text, "r,l,r", to, address, count)


def to_shared(address: ir.Value, at: int, words: Sequence[ir.Value]) -> None:
    ptx(f"st.shared.v4.b32 [$0 + {at}], {{$1, $2, $3, $4}};", "r,r,r,r,r", address, *words)


def from_shared(address: ir.Value, at: int) -> list[ir.Value]:
    text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {at}];"
    return ptx(text, "=r,=r,=r,=r,r", address, outputs=4)


def word_to_shared(address: ir.Value, word: ir.Value) -> None:
    ptx("st.shared.b32 [$0], $1;", "r,r", address, word)


def prefetch_line(address: ir.Value, at: int) -> None:
    """Have L2 fetch the 128 bytes around an address."""
    ptx(f"prefetch.global.L2 [$0 + {at}];", "l", address)


def prefetch_bulk(address: ir.Value, size: int) -> None:
    """Have L2 fetch so many bytes, for the whole warp once."""
    ptx(
        f"{{ .reg .pred p; elect.sync _|p, {WARP};"
        f" @p cp.async.bulk.prefetch.L2.global [$0], {size}; }}",
        "l", address,
    )  # fmt: skip


def if_any(flag: ir.Value, count: int, body: Callable[[ir.Value], None]) -> None:
    """body(0), ..., body(count - 1), in warps of which a lane's flag is not 0."""
    rounds = ptx(  # not to be unrolled
        "{ .reg .pred p; setp.ne.b32 p, $1, 0;"
        f" vote.sync.any.pred p, p, {WARP}; selp.b32 $0, {count}, 0, p; }}",
        "=r,r", flag, outputs=1,
    )  # fmt: skip

    @utils.fori(rounds, [])
    def _(i: ir.Value, carry: Any) -> Any:
        body(i)
        return carry
