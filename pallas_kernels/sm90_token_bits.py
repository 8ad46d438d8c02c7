"""Who chose an expert, as bits in shared memory: a word for 32 tokens, four of them for 128.

Words of an expert lie side by side, so that one access reads them, and a popcount of those before a
token says how many chose the same expert before it.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels import sm90_threads as t

THREADS, WARPS, WORD = 128, 4, 4


def columns(count: int) -> list[tuple[Any, Any]]:
    """A thread's columns, clamped, and whether there are such."""
    warp, lane = t.thread()
    found = [t.add(t.add(t.times(warp, 32), lane), start) for start in range(0, count, THREADS)]
    return [(t.choose(t.less(x, count), x, 0), t.less(x, count)) for x in found]


def words(masks: Any, column: Any, sub: int, size: int) -> list[Any]:
    """The column's four words of the sub-th 128 tokens, which have `size` words of all columns."""
    return t.from_shared(t.add(masks, t.times(column, WARPS * WORD)), sub * size * WORD)


def ones(word: Any) -> Any:
    return t.pure("popc.b32 $0, $1;", "=r,r", word)


def _if(text: str, kinds: str, there: Any, *operands: Any) -> None:
    last = len(operands)
    t.ptx(
        f"{{ .reg .pred p; setp.ne.b32 p, ${last}, 0; @p {text} }}", f"{kinds},r",
        *operands, t.choose(there, 1, 0),
    )  # fmt: skip


def or_if(there: Any, address: Any, word: Any) -> None:
    _if("red.shared.or.b32 [$0], $1;", "r,r", there, address, word)


def store_if(there: Any, address: Any, word: Any) -> None:
    _if("st.shared.b32 [$0], $1;", "r,r", there, address, word)


def store_global_if(there: Any, address: Any, word: Any) -> None:
    _if("st.global.b32 [$0], $1;", "l,r", there, address, word)
