"""BF16 grouped products on Hopper, for groups that start at multiples of 128; what is copied and when is in
`hopper_tiles`.

A block of the sum is 64 numbers, in the layout that each operand has: tensor cores read BF16 along either
side.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper, hopper_tiles
from pallas_kernels.grouped_matmul import gpu, tuning
from pallas_kernels.hopper_tiles import LINE_BYTES, ROWS, TILE_ROWS, Job, Place, Stages, Tiles

BLOCK = LINE_BYTES // 2  # of the sum


def serves(x: Array, w: Array, alignment: int) -> bool:
    """Whether no tile holds rows of two groups, and all lines are whole."""
    whole = x.shape[1] % BLOCK == 0 and w.shape[1] % BLOCK == 0 and w.shape[2] % BLOCK == 0
    return x.dtype == jnp.bfloat16 and alignment % TILE_ROWS == 0 and whole and min(x.shape) > 0


@partial(jax.jit, static_argnames=("alignment", "tiles", "interpret", "sms"))
def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    alignment: int = TILE_ROWS,
    *,
    tiles: Tiles = tuning.HOPPER_BF16,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float[Array, "M N"]:
    """The definition's, of operands that are served; tiles without rows are not written."""

    def windows(place: Place, block) -> tuple:
        rows, columns, depth = _ranges(place, block, tiles)
        return (rows, depth), (*place.of_w, depth, columns)

    blocks = (TILE_ROWS, BLOCK), (BLOCK, tiles.columns)
    job = _job(blocks, windows, lambda x, w, rows: (x.at[rows], w), tiles)
    return _rows(job, x, w, w.shape[2], sizes, alignment, tiles, interpret, sms)


@partial(jax.jit, static_argnames=("alignment", "tiles", "interpret", "sms"))
def matmul_transposed(
    g: Float[Array, "M N"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    alignment: int = TILE_ROWS,
    *,
    tiles: Tiles = tuning.HOPPER_BF16,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float[Array, "M K"]:
    """The same with each matrix transposed, as it is for the cotangents of rows."""

    def windows(place: Place, block) -> tuple:
        rows, columns, depth = _ranges(place, block, tiles)
        return (rows, depth), (*place.of_w, columns, depth)

    blocks = (TILE_ROWS, BLOCK), (tiles.columns, BLOCK)
    job = _job(blocks, windows, lambda g, w, rows: (g.at[rows], w.T), tiles)
    return _rows(job, g, w, w.shape[1], sizes, alignment, tiles, interpret, sms)


@partial(jax.jit, static_argnames=("alignment", "tiles", "interpret", "sms"))
def weight_gradient(
    x: Float[Array, "M K"],
    g: Float[Array, "M N"],
    sizes: Int[Array, " G"],
    alignment: int = TILE_ROWS,
    *,
    tiles: Tiles = tuning.HOPPER_BF16,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float[Array, "G K N"]:
    """The definition's, of operands that are served; padding up to a multiple of 64 rows is summed too."""

    def windows(place: Place, block) -> tuple:
        rows, columns, depth = _ranges(place, block, tiles)
        return (depth, rows), (depth, columns)

    blocks = (BLOCK, TILE_ROWS), (BLOCK, tiles.columns)
    job = _job(blocks, windows, lambda x, g, rows: (x.at[:, rows].T, g), tiles)
    walk, tables = gpu.over_groups(sizes, alignment, x.shape[1], g.shape[1], BLOCK, tiles)
    out = (sizes.shape[0], x.shape[1], g.shape[1]), x.dtype
    return hopper_tiles.run(walk, job, (x, g), tables, None, out, tiles, interpret, sms)


def _rows(job: Job, x, w, n: int, sizes, alignment: int, tiles: Tiles, interpret, sms: int) -> Array:
    (m, k) = x.shape
    walk, tables = gpu.over_rows(sizes, alignment, m, n, k // BLOCK, tiles)
    return hopper_tiles.run(walk, job, (x, w), tables, None, ((m, n), x.dtype), tiles, interpret, sms)


def _ranges(place: Place, block, tiles: Tiles) -> tuple:
    """A tile's rows and columns, and a block of its sum."""
    rows, columns = (
        pl.ds(place.row * TILE_ROWS, TILE_ROWS),
        pl.ds(place.column * tiles.columns, tiles.columns),
    )
    return rows, columns, pl.ds(block * BLOCK, BLOCK)


def _job(blocks: tuple, windows: Callable, sides: Callable, tiles: Tiles) -> Job:
    """`sides` gives the two sides of a product, of a warpgroup's rows, from the two blocks of a stage."""
    lines = hopper.swizzled(BLOCK, jnp.bfloat16)
    buffers = tuple(plgpu.SMEM((tiles.stages, *block), jnp.bfloat16, transforms=lines) for block in blocks)
    return Job(buffers, windows, partial(_sums, sides=sides, columns=tiles.columns), BLOCK)


def _sums(stages: Stages, before, blocks, sides: Callable, columns: int) -> tuple:
    """A warpgroup's part of a tile, in pieces. A stage is given back when the next product is under way."""
    rows = pl.ds(lax.axis_index("wg") * ROWS, ROWS)
    many = stages.buffers[0].shape[0]

    def product(total):
        @pl.loop(0, blocks)
        def _(step):
            slot = stages.wait(before + step)
            plgpu.wgmma(total, *sides(*(buffer.at[slot] for buffer in stages.buffers), rows))
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(stages.emptied.at[lax.rem(before + step - 1, many)])

        plgpu.wgmma_wait(0)

        @pl.when(blocks > 0)
        def _():
            plgpu.barrier_arrive(stages.emptied.at[lax.rem(before + blocks - 1, many)])

        return total[...]

    total = pl.run_scoped(product, plgpu.ACC((ROWS, columns), jnp.float32))
    return tuple(total[:, i : i + BLOCK] for i in range(0, columns, BLOCK))
