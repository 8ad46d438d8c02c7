"""Which tile a Hopper GEMM takes: an analytic choice from a short list, the same every time.

The costs are cycles for one block of K (128 bytes) of one tile, and for its epilogue: the FP8 ones
fitted to times of whole products on an H200 under load, BF16's scaled from them. What is minimised
is cycles times waves of tiles over the card.
"""

from __future__ import annotations

import dataclasses
import math

from pallas_kernels.sm90_tile import Tile

SMS = 132  # of an H100 or H200; on a card with fewer the last clusters wait for the first


@dataclasses.dataclass(frozen=True)
class Costed:
    tile: Tile
    block: float
    epilogue: float


LARGE = (
    Costed(Tile(2, 128, 3, down=2, beside=2, slots=4), 1240, 2500),
    Costed(Tile(3, 128, 4, beside=2, slots=2), 985, 1800),
    Costed(Tile(2, 192, 4, below=2), 975, 2000),
    Costed(Tile(2, 128, 6, depth=2), 700, 1500),
)
GROUPED = (
    Costed(Tile(2, 128, 3, down=2, beside=2, slots=2), 1240, 2500),
    Costed(Tile(3, 128, 4, beside=2), 985, 1800),
    Costed(Tile(2, 128, 5, depth=2), 700, 1500),
)
MASKED = (
    Costed(Tile(2, 128, 4, down=2), 1240, 2500),
    Costed(Tile(2, 128, 6, depth=2), 700, 1500),
    Costed(Tile(1, 64, 12, depth=2), 330, 1000),
)
BY_ROW = Tile(2, 128, 5, slots=2)  # a scale a row of B: column scales take registers


def _fits(tile: Tile, blocks: int) -> Tile:
    """The tile with a depth that divides the blocks of K."""
    return dataclasses.replace(tile, depth=math.gcd(tile.depth, blocks))


def _cycles(costed: Costed, m: int, n: int, blocks: int, groups: int, sms: int) -> float:
    tile = costed.tile
    high, wide = tile.height * tile.below, tile.width * tile.beside
    waves = groups * -(-m // high) * -(-n // wide) / (sms // tile.cluster)
    # Half a missing wave: the card is short of power, and idle SMs leave theirs to the others.
    return (math.ceil(waves) + waves) / 2 * (blocks * costed.block + costed.epilogue)


def _best(costs: tuple[Costed, ...], m: int, n: int, blocks: int, groups: int, sms: int) -> Tile:
    best = min(costs, key=lambda costed: _cycles(costed, m, n, blocks, groups, sms))
    return _fits(best.tile, blocks)


def dense(m: int, n: int, blocks: int, sms: int = SMS) -> Tile:
    """For [m, blocks * 128] x [n, blocks * 128]."""
    if m > 128:
        return _best(LARGE, m, n, blocks, 1, sms)
    return _fits(_thin(m, n, blocks, sms), blocks)


def _thin(m: int, n: int, blocks: int, sms: int) -> Tile:
    """Up to 128 rows: bound by reading B, so every SM should read its share of it."""
    enough = 0.7 * sms
    if m <= 64 and 0.9 * sms <= -(-n // 192) <= sms:
        return Tile(1, 192, 6, slots=3)
    if -(-n // 64) >= enough:
        return Tile(1, 64, 12, depth=2) if m <= 64 else Tile(2, 64, 8, depth=2)
    if m > 64 and -(-n // 64) * 2 >= enough:
        return Tile(1, 64, 12, below=2, depth=4)
    tiles = -(-n // 64)
    splits = max(
        (s for s in range(1, max(sms // tiles, 1) + 1) if blocks % (2 * s) == 0), default=1
    )
    if m <= 64:
        return Tile(1, 64, 12, depth=2, splits=splits)
    return Tile(2, 64, 8, depth=2, splits=splits)


def grouped(m: int, n: int, blocks: int, groups: int, sms: int = SMS) -> Tile:
    """For m rows in `groups` groups of sizes known on the device alone."""
    return _best(GROUPED, -(-m // groups), n, blocks, groups, sms)


def masked(m: int, n: int, blocks: int, groups: int, sms: int = SMS) -> Tile:
    """For up to m rows in each of `groups` groups."""
    return _best(MASKED, m, n, blocks, groups, sms)


BF16 = (
    Costed(Tile(2, 256, 4, below=2), 600, 1500),
    Costed(Tile(2, 128, 6), 310, 800),
    Costed(Tile(1, 128, 8), 170, 500),
)


def bf16(m: int, n: int, groups: int, sms: int = SMS) -> Tile:
    """For `groups` products of about m rows each; K makes no difference."""
    best = min(BF16, key=lambda costed: _cycles(costed, m, n, 32, groups, sms))
    return best.tile


BF16_WGRAD = Tile(2, 256, 4)
