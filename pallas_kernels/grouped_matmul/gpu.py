"""FP8 grouped products on Hopper, for groups that start at multiples of 128; how their tiles are computed is
in `hopper_products`.

Which tiles there are follows from the sizes of groups, so kernels read it from small tables.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import hopper, hopper_products
from pallas_kernels.grouped_matmul import items, reference, tuning
from pallas_kernels.hopper_products import K, Operands
from pallas_kernels.hopper_tiles import TILE_ROWS, Place, Tiles, W, Walk, X
from pallas_kernels.scaled import Scaled


def serves(x: Scaled, w: Scaled, alignment: int, dtype) -> bool:
    """Whether no tile holds rows of two groups, scales are the report's, and TMA can write rows."""
    aligned = alignment % TILE_ROWS == 0 and w.shape[-2] * jnp.dtype(dtype).itemsize % 16 == 0
    return aligned and min(x.shape) > 0 and x.tile == (1, K) and w.tile == (K, K)


def serves_gradient(x: Scaled, y: Scaled) -> bool:
    """Whether blocks of the sum are the report's, and rows of results whole 16 bytes."""
    return x.tile == y.tile == (1, K) and y.shape[0] % 4 == 0 and min(x.shape) > 0


def over_rows(sizes, alignment: int, m: int, n: int, steps: int, tiles: Tiles) -> tuple[Callable, list]:
    """The walk over tiles of rows [m, n], and its tables.

    The programs of a cluster take neighbouring columns of the same rows, which are of one group, and read the
    rows together.
    """
    found = items.of_rows(sizes, alignment, m, TILE_ROWS)
    columns = pl.cdiv(n, tiles.columns * tiles.sharing)

    def walk(groups, rows, number) -> Walk:
        def place(index) -> Place:
            item, j = lax.div(index, columns), lax.rem(index, columns)
            column = j * tiles.sharing + lax.axis_index("peer")
            return Place(rows[item], column, 0, steps, of_w=(groups[item],))

        return Walk(number[0] * columns, place, shared=X)

    return walk, [found.groups, found.tiles, found.number[None]]


def over_groups(sizes, alignment: int, rows: int, columns: int, block: int, tiles: Tiles):
    """The walk over tiles of sums [rows, columns] over each group, in blocks of so many, and its tables."""
    grid = pl.cdiv(rows, TILE_ROWS * tiles.sharing), pl.cdiv(columns, tiles.columns)
    each = grid[0] * grid[1]

    def walk(first, steps) -> Walk:
        def place(index) -> Place:
            group = lax.div(index, each)
            i, j = plgpu.planar_snake(lax.rem(index, each), grid, 1, tuning.HOPPER_SNAKE)
            row = i * tiles.sharing + lax.axis_index("peer")
            return Place(row, j, first[group], steps[group], of_out=(group,))

        return Walk(sizes.shape[0] * each, place, shared=W)

    tables = [reference.starts(sizes, alignment) // block, -(-sizes // block)]
    return walk, [lax.convert_element_type(table, jnp.int32) for table in tables]


@partial(jax.jit, static_argnames=("alignment", "dtype", "tiles", "interpret", "sms"))
def fp8_matmul(
    x: Scaled,
    w: Scaled,
    sizes: Int[Array, " G"],
    alignment: int = TILE_ROWS,
    dtype=jnp.bfloat16,
    *,
    tiles: Tiles | None = None,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float[Array, "M N"]:
    """The definition's, of operands that are served; tiles without rows are not written."""
    (m, k), n = x.shape, w.shape[1]
    tiles = tiles or tuning.hopper_of_rows(m, n, k, dtype)
    steps = pl.cdiv(pl.cdiv(k, K), tiles.flight) * tiles.flight
    walk, tables = over_rows(sizes, alignment, m, n, steps, tiles)
    operands = Operands.by_block(x, w, tiles)
    out, scaling = ((m, n), dtype), hopper_products.by_pieces
    return hopper_products.run(walk, operands, tables, None, out, tiles, scaling, interpret, sms)


@partial(jax.jit, static_argnames=("alignment", "tiles", "interpret", "sms"))
def fp8_weight_gradient(
    x: Scaled,
    y: Scaled,
    sizes: Int[Array, " G"],
    alignment: int = K,
    into: Float32[Array, "G I O"] | None = None,
    *,
    tiles: Tiles = tuning.HOPPER_OF_GROUPS,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float32[Array, "G I O"]:
    """The definition's, of operands that are served. `into` is read and not overwritten."""
    groups, rows, columns = sizes.shape[0], x.shape[0], y.shape[0]
    walk, tables = over_groups(sizes, alignment, rows, columns, K, tiles)
    out, scaling = ((groups, rows, columns), jnp.float32), hopper_products.by_column
    operands = Operands.by_column(x, y)
    return hopper_products.run(walk, operands, tables, into, out, tiles, scaling, interpret, sms)
