"""What a warpgroup's 128 threads do to tokens, instruction by instruction, without a card."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sm90_mla_tokens as tokens
from pallas_kernels import sm90_threads

FULL = 0xFFFFFFFF
LANE, WARP = np.arange(128) % 32, np.arange(128) // 32
HUGE = 1 << 40  # where addresses of global memory begin


def signed(x):
    return ((np.asarray(x, np.int64) & FULL) ^ 1 << 31) - (1 << 31)


class Threads:
    """`sm90_threads` on numbers of NumPy, one a thread, and on two byte arrays."""

    def __init__(self, memory, shared):
        self.memory, self.shared = memory, shared
        self.lines = set()

    def patch(self, monkeypatch):
        for name in dir(type(self)):
            if hasattr(sm90_threads, name) and not name.startswith("_"):
                monkeypatch.setattr(sm90_threads, name, getattr(self, name))

    def in_order(self):
        pass

    def add(self, x, y):
        return x + y & FULL

    here = add

    def times(self, x, y):
        return x * y & FULL

    def bits(self, x, y):
        return x & y

    def xor(self, x, y):
        return x ^ y

    def down(self, x, y):
        return x >> y

    def less(self, x, y):
        return signed(x) < signed(y)

    def within(self, x, count):
        return (x & FULL) < count

    def choose(self, condition, x, y):
        return np.where(condition, x, y) & FULL

    def thread(self, anew=False):
        return WARP, LANE

    def onward(self, address, count):
        return address + (count & FULL)

    def row(self, address, number, size):
        return address + signed(number) * size

    def shuffle(self, value, lane, width=32):
        value = np.broadcast_to(value, 128)
        return value[WARP * 32 + LANE // width * width + np.broadcast_to(lane, 128) % width]

    def first_of(self, value):
        there = (signed(value) >= 0).reshape(4, 32)
        return value.reshape(4, 32)[np.arange(4), there.argmax(axis=1)].repeat(32)

    def words(self, array, address, at, count, start=0):
        place = np.broadcast_to(address, 128) + at - start
        assert (place % (4 * count) == 0).all()
        assert (place >= 0).all()
        assert (place + 4 * count <= array.size).all()
        chosen = array[place[:, None] + np.arange(4 * count)]
        return list(np.ascontiguousarray(chosen).view(np.uint32).astype(np.int64).T)

    def load(self, address, at=0):
        return self.words(self.memory, address, at, 1, HUGE)[0]

    def load_pair(self, address, at=0):
        return self.words(self.memory, address, at, 2, HUGE)

    def load_if(self, there, address, at=0):
        address = np.where(there != 0, address, HUGE - at)
        return np.where(there != 0, self.load(address, at), 0)

    def from_shared(self, address, at):
        return self.words(self.shared, address, at, 4)

    def to_shared(self, address, at, words):
        for quarter in range(0, 128, 8):  # threads that share a pass: a bank of 16 bytes each
            assert len(set((address + at)[quarter : quarter + 8] % 128)) == 8
        place = (np.broadcast_to(address, 128) + at)[:, None] + np.arange(16)
        assert len(np.unique(place)) == place.size
        bits = np.stack([np.broadcast_to(word, 128) for word in words], axis=1)
        self.shared[place] = bits.astype(np.uint32).view(np.uint8)

    def word_to_shared(self, address, word):
        self.shared[address[:, None] + np.arange(4)] = (
            word.astype(np.uint32)[:, None].view(np.uint8)
        )  # fmt: skip

    def copy(self, to, to_at, address, at, count):
        assert set(np.unique(count)) <= {0, 16}
        words = self.words(self.memory, np.where(count > 0, address, HUGE - at), at, 4, HUGE)
        self.to_shared(to, to_at, [np.where(count > 0, word, 0) for word in words])

    def prefetch_line(self, address, at):
        self.lines |= set((address + at) // 128)

    def if_any(self, flag, count, body):
        if np.any(flag):  # in all warps: it must not matter to those that have none
            for i in range(count):
                body(i)

    def pure(self, text, constraints, *inputs):
        assert constraints.count("r") == 1 + len(inputs)
        return run_ptx(text, inputs)


def halves(x):
    """bfloat16 pairs as float64 [..., 2], and back."""
    x = np.broadcast_to(np.asarray(x), 128).astype(np.uint32)
    return (x[:, None] >> np.array([0, 16]) << 16 & FULL).astype(np.uint32).view(np.float32)


def joined(pair):
    with np.errstate(over="ignore"):
        found = pair.astype(jnp.bfloat16).view(np.uint16).astype(np.int64)
    return found[:, 0] | found[:, 1] << 16


def prmt(word, selector):
    found = 0
    for i in range(4):
        byte = word >> 8 * (selector >> 4 * i & 3) & 255
        sign = np.where(byte > 127, 255, 0)
        found = found | np.where(selector >> 4 * i & 8, sign, byte) << 8 * i
    return found


def run_ptx(text, inputs):
    """Straight-line PTX of the few instructions that are used; floats are kept as float32."""
    values = {f"${i + 1}": np.broadcast_to(x, 128) for i, x in enumerate(inputs)}

    def value(name):
        if name.startswith("0f"):
            return np.full(128, int(name[2:], 16), np.uint32).view(np.float32)
        return values[name] if name in values else np.full(128, int(name, 0), np.int64)

    def number(x):
        return x if x.dtype == np.float32 else x.astype(np.uint32).view(np.float32)

    for line in re.sub(r"[{}]|\.reg[^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        name, rest = line.strip().split(" ", 1)
        to, *operands = (x.strip() for x in rest.split(","))
        x = [value(operand) for operand in operands]
        with np.errstate(all="ignore"):
            match name:
                case "mov.b32":
                    values[to] = x[0]
                case "prmt.b32":
                    assert not x[1].any()
                    values[to] = prmt(x[0], int(x[2][0]))
                case "shl.b32":
                    values[to] = x[0] << x[1] & FULL
                case "and.b32":
                    values[to] = x[0] & x[1]
                case "abs.f32":
                    values[to] = np.abs(number(x[0]))
                case "mul.f32":
                    values[to] = number(x[0]) * number(x[1])
                case "setp.le.f32":
                    values[to] = number(x[0]) <= number(x[1])
                case "selp.f32" | "selp.b32":
                    values[to] = np.where(x[2], x[0], x[1])
                case "cvt.rn.bf16x2.f32":
                    values[to] = joined(np.stack([number(x[1]), number(x[0])], axis=1))
                case "mul.rn.bf16x2":
                    values[to] = joined(halves(x[0]).astype(np.float64) * halves(x[1]))
                case _:
                    raise NotImplementedError(name)
    return values["$0"]


def tiled(shared, columns):
    """[64, columns] of shared memory in swizzled tiles of 8 rows of 64 columns of bfloat16."""
    row, column = np.meshgrid(np.arange(64), np.arange(columns), indexing="ij")
    piece = column % 64 // 8 ^ row % 8
    tile = row // 8 * (columns // 64) + column // 64
    place = tile * 1024 + row % 8 * 128 + piece * 16 + column % 8 * 2
    return shared[place[..., None] + np.arange(2)].view(np.uint16)[..., 0].view(jnp.bfloat16)


def fp8_cache(count, scales, seed=0):
    rng = np.random.default_rng(seed)
    cache = rng.integers(0, 256, (count, 656), dtype=np.uint8)
    cache[:, :512][cache[:, :512] & 127 == 127] = 5  # no NaN
    cache[:, :256] = np.arange(256)
    cache[:, [127, 255]] = 7
    drawn = rng.choice(np.asarray(scales, np.float32), (count, 4))
    cache[:, 512:528] = drawn.view(np.uint8)
    return cache


def latents(cache):
    values = cache[:, :512].view(jnp.float8_e4m3fn).astype(np.float64)
    scales = np.ascontiguousarray(cache[:, 512:528]).view(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        return (values * scales.repeat(128, axis=1)).astype(np.float32).astype(jnp.bfloat16)


def same(found, expected):
    """Equal, signs of zero aside."""
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


USUAL = [2.0**-9, 2.0**-2, 1.0, 2.0**7]
ALL = [2.0**i for i in range(-120, 119)]


def convert(monkeypatch, cache, where, listed, half, width):
    """A half of a page as refs of so many columns side by side, [64, 256]."""
    size = 64 * width * 2
    threads = Threads(cache.reshape(-1), np.full(256 // width * size + 4096, 99, np.uint8))
    threads.patch(monkeypatch)
    refs = [2048 + i * size for i in range(256 // width)]
    rows = tokens._rows(HUGE, where, tokens.BYTES, listed)
    scale = tokens._load_scales(rows, half)
    factor = tokens._factor(scale)
    rows = tokens._rows(HUGE, where, tokens.BYTES, listed, 8)
    for batch in range(tokens.EACH // tokens.BATCH):
        tokens._store(tokens._load(rows, half, batch), factor, refs, batch)
    tokens._mend(scale, refs)
    assert (threads.shared[:2048] == 99).all()
    assert (threads.shared[-2048:] == 99).all()
    found = [tiled(threads.shared[ref : ref + size], width) for ref in refs]
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("width", [256, 128, 64])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("scales", [USUAL, ALL])
def test_fp8_page(monkeypatch, width, half, scales):
    cache = fp8_cache(3 * 64, scales)
    expected = latents(cache)[64:128, half * 256 :][:, :256].copy()
    cache[64 + 41 : 128] = 127
    expected[41:] = 0
    where = np.full(128, 1), np.full(128, 41)
    same(convert(monkeypatch, cache, where, False, half, width), expected)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("missing", [0, 0.3, 1])
def test_fp8_chosen(monkeypatch, half, missing):
    rng = np.random.default_rng(1)
    cache = fp8_cache(500, USUAL)
    table = rng.integers(0, 500, (3, 256), dtype=np.int32)
    table[rng.random(table.shape) < missing] = -1
    table[2, 200] = 2147480000
    slot, request, step = 1, 2, 1
    memory = np.concatenate([cache.reshape(-1), table.view(np.uint8).reshape(-1)])
    Threads(memory, np.zeros(16, np.uint8)).patch(monkeypatch)
    number = tokens._number(HUGE + cache.size, request, step, slot, 256)
    where = tokens._settled(number, np.full(128, request), 500)
    assert (where[0] < 500).all()
    chosen = table[2, 192:]
    there = (chosen >= 0) & (chosen < 500)
    expected = np.where(there[:, None], latents(cache)[np.where(there, chosen, 0)], 0)
    expected = expected[:, half * 256 :][:, :256]
    same(convert(monkeypatch, cache, where, True, half, 128), expected)


def test_notes(monkeypatch):
    threads = Threads(None, np.zeros(4 * 128, np.uint8))
    threads.patch(monkeypatch)
    there = np.random.default_rng(0).integers(0, 2, (2, 64))
    own = WARP + 4 * (LANE % 16)
    tokens._note(0, *(16 * page[own] for page in there))
    np.testing.assert_array_equal(threads.shared.view(np.int32), there.reshape(-1) - 1)


def test_entries(monkeypatch):
    table = np.array([[1, 2, 3], [4, -5, 2147480000]], np.int32)
    Threads(table.view(np.uint8).reshape(-1), None).patch(monkeypatch)
    for step, expected in ((0, (4, 0)), (1, (9, 9)), (7, (9, 9))):
        found = tokens._both(tokens._entry(HUGE, 1, step, 3), 9)
        assert (np.stack(found) == np.array(expected)[:, None]).all()


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_copies(monkeypatch, fp8, listed):
    rng = np.random.default_rng(2)
    size = tokens.BYTES if fp8 else 2 * tokens.WIDTH
    cache = rng.integers(0, 256, (192, size), dtype=np.uint8)
    threads = Threads(cache.reshape(-1), np.full(64 * 128 + 64 * 512, 99, np.uint8))
    threads.patch(monkeypatch)
    own = WARP + 4 * (LANE % 16)
    if listed:
        number, there = rng.integers(0, 192, 64), rng.random(64) < 0.7
        where = number[own], 16 * there[own]
    else:
        number, there = np.arange(64, 128), np.arange(64) < 50
        where = np.full(128, 1), np.full(128, 50)
    expected = np.where(there[:, None], cache[number], 0).view(np.uint16)
    rows = tokens._rows(HUGE, where, size, listed)
    tokens._copy_keys(rows, 0)
    keys = tiled(threads.shared[: 64 * 128], 64).view(np.uint16)
    np.testing.assert_array_equal(keys, expected[:, -64:])
    tokens._prefetch(rows)
    first = (HUGE + number * size) // 128
    last = (HUGE + number * size + size - 1) // 128
    assert threads.lines == {i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)}
    if fp8 or not listed:
        return
    for half in range(2):
        base = [64 * 128, 64 * 128 + 64 * 256]
        tokens._copy(tokens._rows(HUGE, where, size, listed, 16), half, base)
        found = [tiled(threads.shared[at : at + 64 * 256], 128).view(np.uint16) for at in base]
        np.testing.assert_array_equal(
            np.concatenate(found, axis=1), expected[:, half * 256 :][:, :256]
        )
