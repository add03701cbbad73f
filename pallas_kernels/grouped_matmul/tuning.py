"""Tiles of the grouped products, from schedules of the compilers: nothing here was timed on a chip.

On TPU: bundles are what its compiler issues, one a cycle at best, for 512 x 512 results and 1024 of the sum,
from loops compiled at two depths (jax 0.12, libtpu 0.0.50). The matrix unit of tpu7x needs about 880 cycles
for them in BF16 and 440 in FP8.
"""

from typing import NamedTuple

from pallas_kernels.fp8_matmul import tuning as dense
from pallas_kernels.hopper_tiles import Tiles as HopperTiles

STRIP = 16 << 20  # bytes of a matrix in VMEM at a time; the next strip is fetched meanwhile


class Tiles(NamedTuple):
    """Of a result on a TPU, and how much of the sum one step takes."""

    rows: int
    columns: int
    depth: int


def of_rows(depth: int, itemsize: int) -> Tiles:
    """For products whose results are rows.

    On tpu7x, 256 x 1024 takes 1346 bundles in FP8 with scales every 128, 512 x 512 takes 1332 and 256 x 512
    1356: so tiles have few rows, for groups that end inside one, and many columns, for which rows are read
    less often. Scales that run along rows instead of columns of the accumulator took about 2400. BF16 takes
    576 and 432.
    """
    columns = next((c for c in (1024, 512, 256) if depth * c * itemsize <= STRIP), 128)
    return Tiles(256, columns, 1024)


def of_groups() -> Tiles:
    """For sums over rows.

    On tpu7x, 512 x 1024 takes 642 bundles in BF16, and this, twice that, reads rows less often. In FP8 it
    takes 2620, 512 x 512 takes 2743; twice the depth would take 2460 and twice as long to compile.
    """
    return Tiles(1024, 1024, 512)


# On Hopper the registers of a warpgroup decide, as for the dense product. Groups end anywhere, so their sums
# take one block at a time; while one warpgroup adds, the other multiplies.
HOPPER_OF_GROUPS = HopperTiles.filling(columns=128, flight=1, sharing=2, dtype="float32", scales=128)
HOPPER_SNAKE = dense.SNAKE

# Without scales to wait for, sums stay in tensor cores' reach and the widest product is best.
HOPPER_BF16 = HopperTiles.filling(columns=256, flight=1, sharing=2, dtype="bfloat16")


def hopper_of_rows(m: int, n: int, k: int, dtype) -> HopperTiles:
    """For products whose results are rows: as dense ones, but that neighbours share rows."""
    return dense.hopper(m, n, k, tile=128, dtype=dtype)
