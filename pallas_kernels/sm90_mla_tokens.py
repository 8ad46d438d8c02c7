"""A warpgroup that brings tokens of a cache, wherever they lie, to shared memory as bfloat16.

* Tokens come half by half, 256 latents of one to a warp at a time: FP8 through registers, 8 a lane;
  bfloat16, and rotary keys, by instructions that need no registers for them.
* Of every 64 tokens a warp has those whose number leaves it when divided by 4, so that their
  places in shared memory, rows of 128 bytes whose 16-byte pieces change places with the row, differ
  by constants, and 8 lanes always write a whole row.
* An e4m3 whose bits are put in the place of a bfloat16's lowest exponents and highest mantissa bits
  is that number times 2**-120, subnormals included: one product makes up for it and for the scale,
  four instructions for two numbers. Conversion instructions would take several times as long.
* A product by 2**120 times a scale has no room for scales above 2**7. Tokens that have one are
  multiplied once more where they lie.
* Tokens that are not there, behind a request's end or with an index of no token, become zeros:
  their scale is 0, and whatever is read in their place is a finite number (there is no bit pattern
  that becomes anything else).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import sm90_threads as t
from pallas_kernels.sm90_tile import transforms

SCALAR = plgpu.Layout.WG_SPLAT
SMEM = plgpu.RefType(transforms(64, 128))
PAGE, LATENT, WIDTH, ROPE = 64, 512, 576, 64
HALF = LATENT // 2
BYTES, SCALES_AT, KEY_AT = 656, 512, 528  # of a token in FP8
EACH = PAGE // 4  # tokens of a page that a warp has
BATCH = 4  # tokens that are loaded and stored together
WORD = plgpu.ShapeDtypeStruct((128,), jnp.int32, t.LANES)
RAW = plgpu.ShapeDtypeStruct((2 * 128 * BATCH,), jnp.int32, t.pairs(BATCH))
Where = tuple[jax.Array, jax.Array]  # a page and how many tokens it has, or `listed` tokens


def entries(table: Any, request: Any, step: Any) -> jax.Array:
    """Load what block `table` [requests, pages] says of a step's pages, for `paged`: half a warp
    one each. (A scalar would be waited for here.)"""
    width = table.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=WORD)
    def run(_: Any, table: Any, request: Any, step: Any) -> Any:
        (request,), (step,) = t.registers(request), t.registers(step)
        return t.array([_entry(t.memory(table), request, step, width)])

    return run(table, request, step)


def _entry(table: Any, request: Any, step: Any, width: int) -> Any:
    _, lane = t.thread(anew=True)
    column = t.add(t.times(step, 2), t.down(lane, 4))
    column = t.choose(t.less(column, width), column, width - 1)
    return t.load(t.row(t.row(table, request, 4 * width), column, 4))


def paged(tokens: Any, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both pages, each in all lanes. Entries behind a request's end may be anything."""
    last = tokens.shape[0] // PAGE - 1

    @plgpu.inline_mgpu(arg_types=(t.LANES,), return_type=(WORD, WORD))
    def run(_: Any, entries: Any) -> Any:
        (entry,) = t.registers(entries)
        return tuple(t.array([page]) for page in _both(entry, last))

    return run(entries)


def _both(entry: Any, last: int) -> tuple[Any, Any]:
    page = t.choose(t.less(entry, 0), 0, t.choose(t.less(entry, last), entry, last))
    return t.shuffle(page, 0), t.shuffle(page, 16)


def chosen(table: Any, request: Any, step: Any, slot: int) -> jax.Array:
    """Load what `table` [requests, tokens] says of a step's page, for `listed`."""
    width = table.shape[1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=WORD)
    def run(_: Any, table: Any, request: Any, step: Any) -> Any:
        (request,), (step,) = t.registers(request), t.registers(step)
        return t.array([_number(t.memory(table), request, step, slot, width)])

    return run(table, request, step)


def _number(table: Any, request: Any, step: Any, slot: int, width: int) -> Any:
    warp, lane = t.thread(anew=True)
    line = t.row(t.row(table, request, 4 * width), step, 8 * PAGE)
    own = t.add(warp, t.times(t.bits(lane, EACH - 1), 4))
    return t.load(t.onward(line, t.times(own, 4)), 4 * PAGE * slot)


def listed(tokens: Any, numbers: jax.Array, request: Any) -> Where:
    """(number, 16), or (number of another token, 0) for what is no token of the cache."""
    count = tokens.shape[0]

    @plgpu.inline_mgpu(arg_types=(t.LANES, SCALAR), return_type=(WORD, WORD))
    def run(_: Any, numbers: Any, request: Any) -> Any:
        (number,), (request,) = t.registers(numbers), t.registers(request)
        found, there = _settled(number, request, count)
        return t.array([found]), t.array([there])

    return run(numbers, request)


def _settled(number: Any, request: Any, count: int) -> tuple[Any, Any]:
    """What is no token is read as a neighbour, or if there are none as one that other SMs do not
    read as well: a single token for all of them would be waited for."""
    there = t.within(number, count)
    number = t.choose(there, number, -1)
    spare = t.first_of(number)
    other = t.choose(t.within(request, count), request, count - 1)
    spare = t.choose(t.less(spare, 0), other, spare)
    return t.choose(there, number, spare), t.choose(there, 16, 0)


def note(places: Any, even: Where, odd: Where) -> None:
    """Whether a step's tokens are there, for those who mask scores: int32 [128], -1 if not."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), t.LANES, t.LANES))
    def run(_: Any, places: Any, *sizes: Any) -> None:
        _note(t.shared(places), *(t.registers(size)[0] for size in sizes))

    run(places, even[1], odd[1])


def _note(places: Any, even: Any, odd: Any) -> None:
    warp, lane = t.thread(anew=True)
    page = t.down(lane, 4)
    at = t.add(t.times(page, PAGE), t.add(warp, t.times(t.bits(lane, EACH - 1), 4)))
    size = t.choose(t.within(page, 1), even, odd)
    t.word_to_shared(t.add(places, t.times(at, 4)), t.choose(t.less(size, 1), -1, 0))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Addresses of a warp's tokens, each with how many bytes of 16 may be taken (none: it is not
    there). `base` is the cache's, or the page's and the warp's if tokens are no list."""

    base: Any
    where: tuple[Any, Any]
    size: int
    warp: Any
    lane: Any
    listed: bool

    def __getitem__(self, j: int) -> tuple[Any, int]:
        """(address, and a constant to add) of the warp's token j, the same for all its lanes."""
        if not self.listed:
            return self.base, 4 * j * self.size
        return t.row(self.base, t.shuffle(self.where[0], j), self.size), 0

    def own(self) -> tuple[Any, Any]:
        """Of token lane % 16."""
        j = t.bits(self.lane, EACH - 1)
        if self.listed:
            return t.row(self.base, self.where[0], self.size), self.where[1]
        return self._at(j)

    def four(self, k: int) -> tuple[Any, Any]:
        """Of token 4 k + lane // 8."""
        j = t.add(t.down(self.lane, 3), 4 * k)
        if not self.listed:
            return self._at(j)
        number, size = (t.shuffle(x, j) for x in self.where)
        return t.row(self.base, number, self.size), size

    def _at(self, j: Any) -> tuple[Any, Any]:
        there = t.less(t.add(self.warp, t.times(j, 4)), self.where[1])
        return t.onward(self.base, t.times(j, 4 * self.size)), t.choose(there, 16, 0)


def _rows(base: Any, where: Sequence[Any], size: int, listed: bool, offset: int = 0) -> _Rows:
    """Each lane `offset` bytes behind the one before."""
    warp, lane = t.thread(anew=not offset)
    base = t.onward(base, t.times(lane, offset)) if offset else base
    if not listed:
        base = t.onward(t.row(base, where[0], PAGE * size), t.times(warp, size))
    return _Rows(base, (where[0], where[1]), size, warp, lane, listed)


def _kinds(tokens: Any, where: Where) -> tuple[tuple[Any, Any, Any], int, bool]:
    """(types of tokens and where, bytes of a token, whether tokens are listed one by one)."""
    listed = where[1].shape != ()
    size = BYTES if tokens.dtype == jnp.uint8 else 2 * WIDTH
    return (plgpu.RefType(), t.LANES, t.LANES if listed else SCALAR), size, listed


def load(tokens: Any, where: Where, half: int, batch: int) -> jax.Array:
    """A batch of tokens, that half of their latents in FP8, for `store`."""
    kinds, size, listed = _kinds(tokens, where)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=RAW)
    def run(_: Any, tokens: Any, *where: Any) -> Any:
        found = [t.registers(x)[0] for x in where]
        return t.array(_load(_rows(t.memory(tokens), found, size, listed, 8), half, batch))

    return run(tokens, *where)


def _load(rows: _Rows, half: int, batch: int) -> list[Any]:
    found = []
    for j in range(batch * BATCH, (batch + 1) * BATCH):
        address, at = rows[j]
        found.append(t.load_pair(address, at + half * HALF))
    t.in_order()
    return found


def load_scales(tokens: Any, where: Where, half: int) -> jax.Array:
    """Scales of all of the warp's tokens for that half, a lane one of one: scale lane // 16 of two
    of token lane % 16; 0 for tokens that are not there."""
    kinds, size, listed = _kinds(tokens, where)

    @plgpu.inline_mgpu(arg_types=kinds, return_type=WORD)
    def run(_: Any, tokens: Any, *where: Any) -> Any:
        found = [t.registers(x)[0] for x in where]
        return t.array([_load_scales(_rows(t.memory(tokens), found, size, listed), half)])

    return run(tokens, *where)


def _load_scales(rows: _Rows, half: int) -> Any:
    address, there = rows.own()
    address = t.onward(address, t.times(t.down(rows.lane, 4), 4))
    found = t.load_if(there, address, SCALES_AT + 8 * half)
    t.in_order()
    return found


def factors(scales: jax.Array) -> jax.Array:
    """What `store` multiplies by, 2**120 times a scale, in bfloat16 twice; 2**127 if that is too
    much (or not a number)."""

    @plgpu.inline_mgpu(arg_types=(t.LANES,), return_type=WORD)
    def run(_: Any, scales: Any) -> Any:
        return t.array([_factor(*t.registers(scales))])

    return run(scales)


def _factor(scale: Any) -> Any:
    return t.pure(
        "{ .reg .pred p; .reg .f32 a, s; mov.b32 s, $1; abs.f32 a, s; setp.le.f32 p, a, 0f43000000;"
        " mul.f32 s, s, 0f7B800000; selp.f32 s, s, 0f7F000000, p; cvt.rn.bf16x2.f32 $0, s, s; }",
        "=r,r", scale,
    )  # fmt: skip


def store(raw: jax.Array, factors: jax.Array, refs: Sequence[Any], batch: int) -> None:
    """A batch as bfloat16 to its rows of that half of a page: refs [64, W] side by side."""

    @plgpu.inline_mgpu(arg_types=(t.pairs(BATCH), t.LANES, *[SMEM] * len(refs)))
    def run(_: Any, raw: Any, factors: Any, *refs: Any) -> None:
        (factor,) = t.registers(factors)
        _store(t.registers(raw), factor, [t.shared(ref) for ref in refs], batch)

    run(raw, factors, *refs)


def _store(raw: Sequence[Any], factor: Any, refs: Sequence[Any], batch: int) -> None:
    places = _places(refs)
    for i, words in enumerate(raw):
        j = batch * BATCH + i
        by = t.shuffle(factor, j, 16)
        numbers = [_pair(word, by, first) for word in words for first in (0, 2)]
        t.to_shared(*_place(places, refs, j), numbers)


def _pair(word: Any, by: Any, first: int) -> Any:
    """Bytes `first` and the next of e4m3, times a factor, less 120 exponents."""
    selector = first | 8 + first << 4 | first + 1 << 8 | 9 + first << 12  # each below its signs
    return t.pure(
        f"{{ .reg .b32 h; prmt.b32 h, $1, 0, {selector}; shl.b32 h, h, 4;"
        " and.b32 h, h, 0x87F087F0; mul.rn.bf16x2 $0, h, $2; }",
        "=r,r,r", word, by,
    )  # fmt: skip


def _places(refs: Sequence[Any], anew: bool = False) -> tuple[Any, Any]:
    """Where a lane's 16 bytes of the warp's tokens 0 and 1 go."""
    warp, lane = t.thread(anew)
    tiles = HALF // ROPE // len(refs)  # of 64 columns, in each ref
    base = refs[-1]
    for i, ref in reversed(list(enumerate(refs[:-1]))):
        base = t.choose(t.within(lane, 8 * tiles * (i + 1)), ref, base)
    tile = t.times(t.bits(t.down(lane, 3), tiles - 1), 1024)
    piece = t.times(t.xor(t.bits(lane, 7), warp), 16)
    first = t.add(t.add(tile, t.times(warp, 128)), piece)
    return t.here(base, first), t.here(base, t.xor(first, 64))


def _place(places: Sequence[Any], refs: Sequence[Any], j: int) -> tuple[Any, int]:
    """The same of token j, the warp's row 4 j: (address, and a constant to add)."""
    tiles = HALF // ROPE // len(refs)
    return places[j % 2], j // 2 * tiles * 1024 + j % 2 * 4 * 128


def mend(scales: jax.Array, refs: Sequence[Any]) -> None:
    """Multiply what `store` has written by what scales are above 2**7."""

    @plgpu.inline_mgpu(arg_types=(t.LANES, *[SMEM] * len(refs)))
    def run(_: Any, scales: Any, *refs: Any) -> None:
        _mend(*t.registers(scales), [t.shared(ref) for ref in refs])

    run(scales, *refs)


def _mend(scale: Any, refs: Sequence[Any]) -> None:
    more = t.pure(  # in bfloat16 twice; 0 if the scale has been dealt with
        "{ .reg .pred p; .reg .f32 a, s; mov.b32 s, $1; abs.f32 a, s; setp.le.f32 p, a, 0f43000000;"
        " mul.f32 s, s, 0f3C000000; cvt.rn.bf16x2.f32 $0, s, s; selp.b32 $0, 0, $0, p; }",
        "=r,r", scale,
    )  # fmt: skip
    tiles = HALF // ROPE // len(refs)

    def two(i: Any) -> None:
        places = tuple(t.add(place, t.times(i, tiles * 1024)) for place in _places(refs, True))
        for j in range(2):
            by = t.shuffle(more, t.add(t.times(i, 2), j), 16)
            by = t.choose(t.within(by, 1), 0x3F803F80, by)
            place = _place(places, refs, j)
            words = [
                t.pure("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", word, by)
                for word in t.from_shared(*place)
            ]
            t.to_shared(*place, words)

    t.if_any(more, EACH // 2, two)


def copy(tokens: Any, where: Where, half: int, refs: Sequence[Any]) -> None:
    """Start to copy that half of 64 tokens' latents in bfloat16 to refs [64, W] side by side."""
    kinds, size, listed = _kinds(tokens, where)

    @plgpu.inline_mgpu(arg_types=(*kinds, *[SMEM] * len(refs)))
    def run(_: Any, tokens: Any, number: Any, there: Any, *refs: Any) -> None:
        found = [t.registers(x)[0] for x in (number, there)]
        rows = _rows(t.memory(tokens), found, size, listed, 16)
        _copy(rows, half, [t.shared(ref) for ref in refs])

    run(tokens, *where, *refs)


def _copy(rows: _Rows, half: int, refs: Sequence[Any]) -> None:
    places = _places(refs)
    for j in range(EACH):
        address, at = rows[j]
        t.copy(*_place(places, refs, j), address, at + 2 * half * HALF, t.shuffle(rows.where[1], j))


def copy_keys(tokens: Any, where: Where, rope: Any) -> None:
    """Start to copy 64 tokens' rotary keys to [64, 64]."""
    kinds, size, listed = _kinds(tokens, where)

    @plgpu.inline_mgpu(arg_types=(*kinds, SMEM))
    def run(_: Any, tokens: Any, number: Any, there: Any, rope: Any) -> None:
        found = [t.registers(x)[0] for x in (number, there)]
        _copy_keys(_rows(t.memory(tokens), found, size, listed), t.shared(rope))

    run(tokens, *where, rope)


def _copy_keys(rows: _Rows, rope: Any) -> None:
    lane = rows.lane
    piece, token = t.bits(lane, 7), t.add(rows.warp, t.times(t.down(lane, 3), 4))
    swapped = t.times(t.xor(piece, t.bits(token, 7)), 16)
    to = t.add(rope, t.add(t.times(token, 128), swapped))
    at = KEY_AT if rows.size == BYTES else 2 * LATENT
    for k in range(EACH // 4):
        address, size = rows.four(k)
        t.copy(to, k * 16 * 128, t.onward(address, t.times(piece, 16)), at, size)


def end_group() -> None:
    """What this thread has started to copy since the last call is a group."""

    @plgpu.inline_mgpu()
    def run(_: Any) -> None:
        t.ptx("cp.async.commit_group;")

    run()


def await_groups(left: int) -> None:
    """Wait until all but so many of this thread's latest groups are copied."""

    @plgpu.inline_mgpu()
    def run(_: Any) -> None:
        t.ptx(f"cp.async.wait_group {left};")

    run()


def prefetch(tokens: Any, where: Where) -> None:
    """Have L2 fetch a page's tokens from memory."""
    kinds, size, listed = _kinds(tokens, where)

    @plgpu.inline_mgpu(arg_types=kinds)
    def run(_: Any, tokens: Any, *where: Any) -> None:
        found = [t.registers(x)[0] for x in where]
        base = t.memory(tokens)
        if listed:
            _prefetch(_rows(base, found, size, listed))
        else:
            warp, _ = t.thread(anew=True)
            page = t.row(base, found[0], PAGE * size)
            t.prefetch_bulk(t.onward(page, t.times(warp, EACH * size)), EACH * size)

    run(tokens, *where)


def _prefetch(rows: _Rows) -> None:
    """Two lanes take a token, of which there is a piece in every line from its first byte on."""
    lines = -(-rows.size // 128)
    each = -(-lines // 2)
    address, _ = rows.own()
    address = t.onward(address, t.times(t.down(rows.lane, 4), (lines - each) * 128))
    for line in range(each):
        t.prefetch_line(address, line * 128)
