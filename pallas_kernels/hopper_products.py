"""Scaled products on Hopper, whatever their tiles are of: tensor cores multiply 128 columns at a time, CUDA
cores scale and add in FP32.

The tensor cores of Hopper keep about 14 bits of a sum of FP8 products, so after every 128 columns the sum
moves to FP32 registers (arXiv:2412.19437, section 3.3.2). While one of the two computing warpgroups does that
the other keeps the tensor cores busy. A warpgroup has 64 rows: 128 would leave no registers for a second sum.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import hopper, hopper_tiles
from pallas_kernels.hopper_tiles import LINE, ROWS, TILE_ROWS, Job, Place, Stages, Tiles, Walk
from pallas_kernels.scaled import E4M3

K = 128  # columns between promotions, and of a scale


class Operands(NamedTuple):
    """In the layouts that are copied from."""

    x: Float[Array, "M KP"]
    w: Float[Array, "*g N KP"]
    x_scales: Float32[Array, "KB M4"]
    w_scales: Float32[Array, "*g KB L"]

    @classmethod
    def by_column(cls, x, w) -> "Operands":
        """Of matrices with a scale for each row of both."""
        return cls(_whole_lines(x.values), _whole_lines(w.values), _aligned(x.scales.T), _aligned(w.scales.T))

    @classmethod
    def by_block(cls, x, w, tiles: Tiles) -> "Operands":
        """Of rows, and one matrix or several with a scale for each 128 x 128."""
        lines = _by_piece(w.scales, w.shape[-2], tiles.columns)
        return cls(_whole_lines(x.values), _whole_lines(w.values), _aligned(x.scales.T), lines)


def run(
    walk: Callable[..., Walk],
    operands: Operands,
    tables: list[Array],
    into: Array | None,
    out: tuple[tuple[int, ...], Any],
    tiles: Tiles,
    scaling: Callable[[Any, int], list],
    interpret,
    sms: int,
) -> Array:
    """`hopper_tiles.run` of scaled products; `scaling` is `by_column` or `by_pieces`, as the operands are."""
    job = _job(tiles, scaling)
    return hopper_tiles.run(walk, job, operands, tables, into, out, tiles, interpret, sms)


def by_pieces(w_scales, pieces: int) -> list:
    """The scale of each piece of a tile's columns."""
    return [w_scales[i] for i in range(pieces)]


def by_column(w_scales, pieces: int) -> list:
    """The scale of each of a tile's columns, which are one piece."""
    assert pieces == 1
    scales = hopper.load(w_scales, hopper.COLUMNS)
    return [lax.broadcast_in_dim(scales, (ROWS, *scales.shape), [1])]


def _job(tiles: Tiles, scaling) -> Job:
    width, line = _piece(tiles.columns), LINE
    if scaling is by_column:
        width = line = tiles.columns
    values = partial(plgpu.SMEM, dtype=E4M3, transforms=hopper.swizzled(K, E4M3))

    def windows(place: Place, block) -> tuple:
        rows = pl.ds(place.row * TILE_ROWS, TILE_ROWS)
        columns, depth = pl.ds(place.column * tiles.columns, tiles.columns), pl.ds(block * K, K)
        scales = block, pl.ds(place.column * line, line)
        return (rows, depth), (*place.of_w, columns, depth), (block, rows), (*place.of_w, *scales)

    buffers = (
        values((tiles.stages, TILE_ROWS, K)),
        values((tiles.stages, tiles.columns, K)),
        plgpu.SMEM((tiles.stages, TILE_ROWS), jnp.float32),
        plgpu.SMEM((tiles.stages, line), jnp.float32),
    )
    return Job(buffers, windows, partial(_sums, flight=tiles.flight, scaling=scaling, width=width), width)


def _aligned(scales: Float32[Array, "KB M"]) -> Float32[Array, "KB M4"]:
    """Rows of whole 16 bytes, which TMA needs."""
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % 4)))


def _whole_lines(values: Float[Array, "*g R K"]) -> Float[Array, "*g R KP"]:
    """Columns of whole swizzled lines, as jax 0.11 wants them: a copy, where K is no multiple of 128."""
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % K)])


def _piece(columns: int) -> int:
    """The widest run of a tile's columns that no edge of a 128 x 128 scale crosses, wherever it lies."""
    return math.gcd(columns, K)


def _by_piece(scales: Float32[Array, "*g NB KB"], n: int, columns: int) -> Float32[Array, "*g KB L"]:
    """The scales that each tile of columns needs, one line of shared memory for each tile."""
    starts = jnp.arange(0, columns, _piece(columns))[None] + jnp.arange(0, n, columns)[:, None]
    blocks = jnp.minimum(starts // K, scales.shape[-2] - 1)  # pieces past the last column are never stored
    lines = jnp.swapaxes(scales, -1, -2)[..., blocks]
    lines = jnp.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, LINE - blocks.shape[1])])
    return lines.reshape(*lines.shape[:-2], -1)


def _sums(stages: Stages, before, blocks, flight: int, scaling, width: int) -> tuple:
    """The pieces of a warpgroup's part of a tile."""
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
    rows = pl.ds(lax.axis_index("wg") * ROWS, ROWS)
    pieces = stages.buffers[1].shape[1] // width

    def step(s, total):
        return _step(stages, [before + s * flight + b for b in range(flight)], rows, scaling, total)

    return lax.fori_loop(0, lax.div(blocks, flight), step, (zeros,) * pieces)


def _step(stages: Stages, steps: list, rows, scaling, total: tuple) -> tuple:
    """Starts the products of some blocks of K, and adds each to the total while the next are computed."""
    x, w, x_scales, w_scales = stages.buffers

    def start(slots, *sums):
        if len(sums) == len(steps):
            return finish(slots, *sums)
        slot = stages.wait(steps[len(sums)])

        def product(part):
            plgpu.wgmma(part, x.at[slot, rows], w.at[slot].T)
            return start([*slots, slot], *sums, part)

        return pl.run_scoped(product, plgpu.ACC((ROWS, w.shape[1]), jnp.float32))

    def finish(slots, *sums):
        added = total
        for i, (slot, part) in enumerate(zip(slots, sums, strict=True)):
            row_scales = hopper.load(x_scales.at[slot, rows], hopper.ROWS)
            column_scales = scaling(w_scales.at[slot], len(total))
            part = plgpu.wgmma_accumulator_load(part, wait_n=len(sums) - 1 - i)
            added = _promote(added, part, row_scales, column_scales)
            plgpu.commit_smem()  # TMA may overwrite the scales only after they are read
            plgpu.barrier_arrive(stages.emptied.at[slot])
        return added

    return start([])


def _promote(total: tuple, part, rows, columns: list) -> tuple:
    width = total[0].shape[1]
    spread = lambda scale: lax.broadcast_in_dim(scale, (ROWS, width), [0])  # noqa: E731
    added = []
    for i, (sums, scale) in enumerate(zip(total, columns, strict=True)):
        piece = part if len(total) == 1 else part[:, i * width : (i + 1) * width]
        scale = spread(rows * scale) if scale.ndim == 0 else spread(rows) * scale
        added.append(sums + piece * scale)
    return tuple(added)
