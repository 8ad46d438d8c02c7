"""A warpgroup that brings tokens of an FP8 cache, wherever they lie, to shared memory as bfloat16.

* A warp takes a token at a time, of which each lane has 16 latents in FP8, or 16 bytes of bfloat16.
* An e4m3 whose bits are put in the place of a bfloat16's lowest exponents and highest mantissa bits
  is that number times 2**-120, subnormals included: two products make up for it and for the scale,
  three instructions a number. Conversion instructions would take several times as long.
* Shared memory is written as TMA would have: rows of 128 bytes, in which 16-byte pieces change
  places with the row. Lanes of neighbouring columns write their two pieces in opposite order, for
  else they would meet in the same banks.
* Tokens in bfloat16 are copied as they are, by instructions that need no registers for them.
* Tokens that are not there, behind a request's end or with an index of no token, become zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.utils import arith, ir, llvm
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sm90_tile import transforms

SCALAR = plgpu.Layout.WG_SPLAT
SMEM = plgpu.RefType(transforms(64, 128))
LATENT, WIDTH = 512, 576
BYTES, SCALES_AT, KEY_AT = 656, 512, 528  # of a token in FP8
TOKENS = 32  # that a call brings: 8 a warp
EACH = TOKENS // 4
RAW = plgpu.Layout.WG_STRIDED((4 * 128 * EACH,), 4)
SCALES = plgpu.Layout.WG_STRIDED((128 * EACH,), 1)
UP = 0x5D805D80  # 2**60 twice, in bfloat16


def load(tokens: Any, places: Any) -> tuple[jax.Array, jax.Array]:
    """FP8 latents of 32 tokens and their scales, for `store`; `tokens` is the cache's uint8 in
    global memory, `places` int32 [32] in shared memory: the tokens' numbers, -1 for none."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType()),
        return_type=(
            plgpu.ShapeDtypeStruct((4 * 128 * EACH,), jnp.int32, RAW),
            plgpu.ShapeDtypeStruct((128 * EACH,), jnp.int32, SCALES),
        ),
    )
    def run(_: Any, tokens: ir.Value, places: ir.Value) -> Any:
        warp, lane = _thread()
        base = llvm.ptrtoint(_i64(), utils.memref_ptr(tokens))
        raw, scales = [], []
        for j in range(EACH):
            place = _place(places, _add(warp, 4 * j))
            row = _row(base, place)
            raw.append(_vector(_global(row, _mul(lane, 16), place, 4)))
            at = _add(_mul(_shr(lane, 3), 4), SCALES_AT)
            scales.append(_vector(_global(row, at, place, 1)))
        return (
            mgpu.FragmentedArray(
                _registers=np.array(raw), _is_signed=True,
                _layout=mgpu.WGStridedFragLayout((4 * 128 * EACH,), 4),
            ),
            mgpu.FragmentedArray(
                _registers=np.array(scales), _is_signed=True,
                _layout=mgpu.WGStridedFragLayout((128 * EACH,), 1),
            ),
        )  # fmt: skip

    return run(tokens, places)


def store(raw: jax.Array, scales: jax.Array, left: Any, right: Any, first: int) -> None:
    """The latents as bfloat16 in rows `first` on of the halves [64, 256] of a page."""

    @plgpu.inline_mgpu(arg_types=(RAW, SCALES, SMEM, SMEM))
    def run(_: Any, raw: Any, scales: Any, left: ir.Value, right: ir.Value) -> None:
        warp, lane = _thread()
        low = _lt(lane, 16)
        base = arith.select(low, _shared(left), _shared(right))
        column = _and(lane, 15)  # of 16 latents in a half
        tile = _mul(_shr(column, 2), 1024)
        swap = _and(_shr(column, 2), 1)
        for j in range(EACH):
            token = _add(warp, first + 4 * j)
            row = _add(_mul(_shr(token, 3), 4 * 1024), _mul(_and(token, 7), 128))
            row = _add(_add(base, tile), row)
            words = _words(raw.registers.flat[j], 4)
            (scale,) = _words(scales.registers.flat[j], 1)
            both = _expand(words, scale)
            for turn in range(2):
                half = _xor(swap, turn)
                piece = _xor(_add(_mul(_and(column, 3), 2), half), _and(token, 7))
                chosen = [
                    arith.select(_lt(half, 1), a, b)
                    for a, b in zip(both[:4], both[4:], strict=True)
                ]
                _to_shared(_add(row, _mul(piece, 16)), chosen)

    run(raw, scales, left, right)


def copy_keys(tokens: Any, places: Any, rope: Any, first: int) -> None:
    """The rotary keys of 32 tokens to rows `first` on of [64, 64]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SMEM))
    def run(_: Any, tokens: ir.Value, places: ir.Value, rope: ir.Value) -> None:
        warp, lane = _thread()
        base, to = llvm.ptrtoint(_i64(), utils.memref_ptr(tokens)), _shared(rope)
        piece = _and(lane, 7)
        for j in range(TOKENS // 16):
            number = _add(_add(_mul(warp, 4), _shr(lane, 3)), 16 * j)
            place = _place(places, number)
            words = _global(_row(base, place), _add(_mul(piece, 16), KEY_AT), place, 4)
            token = _add(number, first)
            row = _add(_mul(_shr(token, 3), 1024), _mul(_and(token, 7), 128))
            at = _mul(_xor(piece, _and(token, 7)), 16)
            _to_shared(_add(_add(to, row), at), words)

    run(tokens, places, rope)


def copy(tokens: Any, places: Any, left: Any, right: Any, rope: Any) -> None:
    """Start to copy 64 tokens of a bfloat16 cache [tokens, 576]; `places` is int32 [64]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SMEM, SMEM, SMEM))
    def run(
        _: Any, tokens: ir.Value, places: ir.Value, left: ir.Value, right: ir.Value, rope: ir.Value
    ) -> None:
        warp, lane = _thread()
        base = llvm.ptrtoint(_i64(), utils.memref_ptr(tokens))
        halves = _shared(left), _shared(right)
        tile, piece = _mul(_shr(lane, 3), 1024), _and(lane, 7)
        for j in range(16):
            token = _add(warp, 4 * j)
            place = _place(places, token)
            row = _row(base, place, 2 * WIDTH)
            to = _add(_mul(_shr(token, 3), 4 * 1024), _mul(_and(token, 7), 128))
            to = _add(_add(to, tile), _mul(_xor(piece, _and(token, 7)), 16))
            for half in range(2):
                at = _add(_mul(lane, 16), half * LATENT)
                _copy(_add(halves[half], to), row, at, place)
        for j in range(4):
            token = _add(_add(_mul(warp, 4), _shr(lane, 3)), 16 * j)
            place = _place(places, token)
            to = _add(_mul(_shr(token, 3), 1024), _mul(_and(token, 7), 128))
            to = _add(to, _mul(_xor(piece, _and(token, 7)), 16))
            at = _add(_mul(piece, 16), 2 * LATENT)
            _copy(_add(_shared(rope), to), _row(base, place, 2 * WIDTH), at, place)
        _ptx("cp.async.commit_group;")

    run(tokens, places, left, right, rope)


def await_copies(left: int) -> None:
    """Wait until of this thread's calls of `copy` only so many are not done."""

    @plgpu.inline_mgpu()
    def run(_: Any) -> None:
        _ptx(f"cp.async.wait_group {left};")

    run()


def _expand(words: list[ir.Value], scale: ir.Value) -> list[ir.Value]:
    """16 e4m3 and a float32 power of two, to 8 pairs of bfloat16."""
    i32 = ir.IntegerType.get_signless(32)
    by: Any = llvm.inline_asm(  # 2**60 * scale, twice
        i32, [scale],
        "{ .reg .f32 s; mov.b32 s, $1; mul.f32 s, s, 0f5D800000; cvt.rn.bf16x2.f32 $0, s, s; }",
        "=r,r",
    )  # fmt: skip
    found = []
    for word in words:
        for selector in (0x1404, 0x3424):
            pair: Any = llvm.inline_asm(
                i32,
                [word, by, _const(UP)],
                f"{{ .reg .b32 h, t; prmt.b32 h, $1, 0, {selector}; shr.u32 t, h, 4;"
                " and.b32 h, h, 0x80008000; lop3.b32 t, t, 0x07F007F0, h, 0xEA;"
                " mul.rn.bf16x2 t, t, $3; mul.rn.bf16x2 $0, t, $2; }",
                "=r,r,r,r",
            )
            found.append(pair)
    return found


# --- registers and addresses ------------------------------------------------------------------


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def _const(value: int | ir.Value) -> ir.Value:
    if isinstance(value, ir.Value):
        return value
    return utils.c(value, ir.IntegerType.get_signless(32))


def _add(x: ir.Value, y: int | ir.Value) -> ir.Value:
    return arith.addi(x, _const(y))


def _mul(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, _const(y))


def _and(x: ir.Value, y: int) -> ir.Value:
    return arith.andi(x, _const(y))


def _xor(x: ir.Value, y: int | ir.Value) -> ir.Value:
    return arith.xori(x, _const(y))


def _shr(x: ir.Value, y: int) -> ir.Value:
    return arith.shrui(x, _const(y))


def _lt(x: ir.Value, than: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.ult, x, _const(than))


def _thread() -> tuple[ir.Value, ir.Value]:
    """(warp, lane) in the warpgroup."""
    thread = utils.thread_idx()
    return _and(_shr(thread, 5), 3), _and(thread, 31)


def _shared(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _place(places: ir.Value, number: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    at = _add(_shared(places), _mul(number, 4))
    found: Any = llvm.inline_asm(
        i32, [at], "ld.shared.b32 $0, [$1];", "=r,r", has_side_effects=True
    )
    return found


def _row(base: ir.Value, place: ir.Value, size: int = BYTES) -> ir.Value:
    offset = arith.muli(arith.extsi(_i64(), place), utils.c(size, _i64()))
    return arith.addi(base, offset)


def _global(row: ir.Value, at: ir.Value, place: ir.Value, count: int) -> list[ir.Value]:
    """Words at that byte of a token, zeros if it is not there."""
    i32 = ir.IntegerType.get_signless(32)
    names = [f"${i}" for i in range(count)]
    address = arith.addi(row, arith.extui(_i64(), at))
    there = arith.extui(i32, arith.cmpi(arith.CmpIPredicate.sge, place, _const(0)))
    kind, group = (".v4", "{" + ", ".join(names) + "}") if count > 1 else ("", names[0])
    zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
    found: Any = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * count) if count > 1 else i32, [address, there],
        f"{{ .reg .pred p; setp.ne.u32 p, ${count + 1}, 0; {zeros}"
        f" @p ld.global.nc.L1::no_allocate{kind}.b32 {group}, [${count}]; }}",
        ",".join([*["=&r"] * count, "l", "r"]), has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(i32, found, [i]) for i in range(count)] if count > 1 else [found]


def _copy(to: ir.Value, row: ir.Value, at: ir.Value, place: ir.Value) -> None:
    """16 bytes of a token, zeros if it is not there (none of it is read then)."""
    there = arith.cmpi(arith.CmpIPredicate.sge, place, _const(0))
    offset = arith.addi(arith.extui(_i64(), at), row)
    size = arith.select(there, _const(16), _const(0))
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [to, offset, size],
        "cp.async.cg.shared.global [$0], [$1], 16, $2;", "r,l,r", has_side_effects=True,
    )  # fmt: skip


def _ptx(text: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "", has_side_effects=True)


def _to_shared(address: ir.Value, words: Sequence[ir.Value]) -> None:
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [address, *words], "st.shared.v4.b32 [$0], {$1, $2, $3, $4};",
        "r,r,r,r,r", has_side_effects=True,
    )  # fmt: skip


def _vector(words: list[ir.Value]) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    kind = ir.VectorType.get((len(words),), i32)
    found = llvm.mlir_undef(kind)
    for i, word in enumerate(words):
        found = llvm.insertelement(found, word, _const(i))
    return found


def _words(vector: ir.Value, count: int) -> list[ir.Value]:
    return [llvm.extractelement(vector, _const(i)) for i in range(count)]
