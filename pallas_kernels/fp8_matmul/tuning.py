"""Tiles by chip and shape, beside the numbers that chose them. Nothing here was timed on a device."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

from pallas_kernels.hopper import SMS
from pallas_kernels.hopper_tiles import LINE, TILE_ROWS, Tiles


@dataclass(frozen=True)
class TpuTiles:
    """What one step of the TPU kernel multiplies."""

    rows: int
    columns: int
    depth: int  # of K, at most; a multiple of the group

    def within(self, m: int, n: int, k: int, group: int) -> "TpuTiles":
        """No larger than the matrices, and K in even steps."""
        groups = pl.cdiv(k, group)
        steps = pl.cdiv(groups, max(self.depth // group, 1))
        return TpuTiles(min(self.rows, m), min(self.columns, n), pl.cdiv(groups, steps) * group)


# Bundles in the compiled schedule (jax 0.12.0, libtpu 0.0.50) for 512 x 1024 results and 1024 of K, by group.
# A BF16 product without scales takes 2198 on tpu7x, 2952 on v6e and 8915 on v5p; an FP8 one without scales
# 1393 on tpu7x.
#
#   rows x columns x depth   tpu7x, group 128    256    512   1024   v6e, 128    512   v5p, 128    512
#   512 x 1024 x 1024                    4827   2804   2056   1817       5366   2855       9300   8388
#   512 x  512 x 1024                    5810      -   2458      -       5692   3216       9680   8864
#   256 x 1024 x 1024                       -      -   2384      -          -      -          -      -
#   1024 x 1024 x 1024                      -      -   1823      -          -      -          -      -
#   512 x 1024 x 2048                       -      -   1660   1330          -      -          -      -
#
# 1024 rows or, with narrow groups, a depth of 2048 would be somewhat better still, but their programs, all
# unrolled, compile for more than 10 s; loops in their place double the bundles.
TPU_VMEM = 60 * 2**20  # bytes that the compiler may use, of 64 MiB on v5p and tpu7x
_TPU_NARROW = TpuTiles(512, 1024, 1024)
_TPU_WIDE = TpuTiles(512, 1024, 2048)


def tpu(group: int) -> TpuTiles:
    """For groups of so many columns, on every chip."""
    return _TPU_WIDE if group >= 512 else _TPU_NARROW


SNAKE = 8  # tiles of columns that neighbouring programs take, so that they share what the L2 cache holds

# Widths with the blocks in flight that registers allow: sums, products in flight and, for a scale of each
# column, those are columns / 2 registers each, of 232 in all. Each was compiled by ptxas 13.0 without spills
# (128 columns with two in flight and scales by column spill 52 bytes).
_BY_BLOCK = {16: 2, 32: 2, 64: 2, 96: 2, 112: 2, 128: 2, 144: 1, 160: 1, 176: 1, 192: 1}
_BY_COLUMN = {32: 2, 64: 2, 96: 2, 128: 1}
_FIXED = 16  # columns whose work a tile's fixed part, its rows of x and its ends, is counted as: a guess


def hopper(m: int, n: int, k: int, tile: int, dtype) -> Tiles:
    """The width with the least work for the multiprocessor that has most; `tile` rows of w share a scale."""
    sharing = 2 if m > TILE_ROWS else 1  # halves the traffic of w, which L2 could hardly serve otherwise

    def work(width: int, flight: int) -> int:
        tiles = pl.cdiv(m, TILE_ROWS * sharing) * pl.cdiv(n, width)
        return pl.cdiv(tiles, SMS // sharing) * pl.cdiv(pl.cdiv(k, 128), flight) * flight * (width + _FIXED)

    widths = _BY_COLUMN if tile == 1 else _BY_BLOCK
    columns, flight = min(widths.items(), key=lambda item: (work(*item), -item[0]))
    scales = columns if tile == 1 else LINE
    return Tiles.filling(columns, flight, sharing, dtype, scales)
