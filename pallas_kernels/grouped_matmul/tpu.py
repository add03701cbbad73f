"""Grouped products on a TPU: a grid over work items, whose groups and tiles of rows are prefetched scalars.

Products hold the whole depth K of a strip of a matrix in VMEM, so that the items of a group, which follow
each other, read it once. Sums over rows hold one tile of the result while the items of its group pass.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.grouped_matmul import items, tuning
from pallas_kernels.scaled import Scaled
from pallas_kernels.support import cost, out_like

LANES = 128
VMEM = 56 << 20  # bytes that a kernel may ask for: all chips from v5p on have 64 MiB or more
ROWS, COLUMNS = (
    (((0,), (0,)), ((), ())),
    (((1,), (1,)), ((), ())),
)  # that a product sums over, in both operands
MATRIX = (((1,), (0,)), ((), ()))
_STATIC = ("alignment", "tiles", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)
def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G K N"],
    sizes: Int[Array, " G"],
    alignment: int = 1,
    *,
    tiles: tuning.Tiles | None = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """The product of `reference.matmul`."""
    return _plain(x, w, sizes, alignment, MATRIX, tiles, interpret)


@functools.partial(jax.jit, static_argnames=_STATIC)
def matmul_transposed(
    x: Float[Array, "M K"],
    w: Float[Array, "G N K"],
    sizes: Int[Array, " G"],
    alignment: int = 1,
    *,
    tiles: tuning.Tiles | None = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """The same with each matrix as its transpose, which the matrix unit reads as it lies."""
    return _plain(x, w, sizes, alignment, COLUMNS, tiles, interpret)


@functools.partial(jax.jit, static_argnames=("dtype", *_STATIC))
def fp8_matmul(
    x: Scaled,
    w: Scaled,
    sizes: Int[Array, " G"],
    alignment: int = 1,
    dtype=jnp.bfloat16,
    *,
    tiles: tuning.Tiles | None = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """The product of `reference.fp8_matmul` for tiles of a multiple of 128 columns, and of 128 rows in `w`.

    It is made transposed: then the scales of `x` lie along lanes and those of `w` are scalars, so that each
    number of the accumulator costs one multiplication and one addition a tile of K, and no broadcast across
    lanes.
    """
    x, w = _whole_tiles(x), _whole_tiles(w)
    (m, k), (_, n, _), tile = x.shape, w.shape, x.tile[1]
    t = tuning.of_rows(k, 1) if tiles is None else tiles
    t = tuning.Tiles(min(t.rows, m), min(t.columns, n), _divisor(k, t.depth, tile))
    scales = x.scales.mT.reshape(k // t.depth, t.depth // tile, m)
    operands = (x.values, scales, w.values, w.scales)
    specs = [
        pl.BlockSpec((t.rows, k), lambda j, i, groups, tiles, *_: (tiles[i], 0)),
        pl.BlockSpec((*scales.shape[:2], t.rows), lambda j, i, groups, tiles, *_: (0, 0, tiles[i])),
        pl.BlockSpec((None, t.columns, k), lambda j, i, groups, *_: (groups[i], j, 0)),
        pl.BlockSpec(
            (None, *w.scales.shape[1:]), lambda j, i, groups, *_: (groups[i], 0, 0), memory_space=pltpu.SMEM
        ),
    ]
    add = functools.partial(_add_every_depth, depth=t.depth, tile=x.tile[1], rows=w.tile[0])
    work, total = items.of_rows(sizes, alignment, m, t.rows), (t.columns, t.rows)
    return _by_rows(add, jnp.transpose, total, specs, operands, (m, n), dtype, work, t, interpret)


@functools.partial(jax.jit, static_argnames=_STATIC)
def weight_gradient(
    x: Float[Array, "M K"],
    g: Float[Array, "M N"],
    sizes: Int[Array, " G"],
    alignment: int = 1,
    *,
    tiles: tuning.Tiles | None = None,
    interpret=False,
) -> Float[Array, "G K N"]:
    """The sums of `reference.weight_gradient`; padding need not be zero."""
    t = tuning.of_groups() if tiles is None else tiles
    t = tuning.Tiles(min(t.rows, x.shape[1]), min(t.columns, g.shape[1]), min(t.depth, x.shape[0]))
    specs = [
        pl.BlockSpec((t.depth, t.rows), lambda a, b, i, groups, tiles, *_: (tiles[i], a)),
        pl.BlockSpec((t.depth, t.columns), lambda a, b, i, groups, tiles, *_: (tiles[i], b)),
    ]
    shape = (sizes.shape[0], x.shape[1], g.shape[1])
    work = items.of_groups(sizes, alignment, x.shape[0], t.depth)
    add = functools.partial(_add_rows, depth=t.depth)
    return _by_groups(add, specs, (x, g), shape, x.dtype, work, t, None, interpret)


@functools.partial(jax.jit, static_argnames=_STATIC)
def fp8_weight_gradient(
    x: Scaled,
    y: Scaled,
    sizes: Int[Array, " G"],
    alignment: int = 128,
    into: Float32[Array, "G I O"] | None = None,
    *,
    tiles: tuning.Tiles | None = None,
    interpret=False,
) -> Float32[Array, "G I O"]:
    """The sums of `reference.fp8_weight_gradient`; tiles must have a multiple of 128 columns."""
    x, y = _whole_tiles(x), _whole_tiles(y)
    m, tile = x.shape[1], x.tile[1]
    shape = (sizes.shape[0], x.shape[0], y.shape[0])
    t = tuning.of_groups() if tiles is None else tiles
    depth = max(tile, min(t.depth, m) // tile * tile)
    t = tuning.Tiles(min(t.rows, shape[1]), min(t.columns, shape[2]), depth)
    each = t.depth // tile
    scales = y.scales.mT
    scales = jnp.pad(scales, ((0, -scales.shape[0] % each), (0, 0))).reshape(-1, each, shape[2])
    specs = [
        pl.BlockSpec((t.rows, t.depth), lambda a, b, i, groups, tiles, *_: (a, tiles[i])),
        pl.BlockSpec(
            (t.rows, LANES), lambda a, b, i, groups, tiles, *_: (a, jax.lax.div(tiles[i] * each, LANES))
        ),
        pl.BlockSpec((t.columns, t.depth), lambda a, b, i, groups, tiles, *_: (b, tiles[i])),
        pl.BlockSpec((None, each, t.columns), lambda a, b, i, groups, tiles, *_: (tiles[i], 0, b)),
    ]
    operands = (x.values, _lanes(x.scales), y.values, scales)
    work = items.of_groups(sizes, alignment, m, t.depth)
    add = functools.partial(_add_columns, tile=tile)
    return _by_groups(add, specs, operands, shape, jnp.float32, work, t, into, interpret)


def serves_fp8(x: Scaled) -> bool:
    """Whether the FP8 products take operands with these tiles."""
    return x.tile[1] % LANES == 0


def _plain(x, w, sizes, alignment, dimensions, tiles, interpret):
    (m, k), n = x.shape, w.shape[2 if dimensions == MATRIX else 1]
    t = tuning.of_rows(k, x.dtype.itemsize) if tiles is None else tiles
    t = tuning.Tiles(min(t.rows, m), min(t.columns, n), _divisor(k, t.depth, 1))
    strip, place = (
        ((k, t.columns), lambda g, j: (g, 0, j))
        if dimensions == MATRIX
        else ((t.columns, k), lambda g, j: (g, j, 0))
    )
    specs = [
        pl.BlockSpec((t.rows, k), lambda j, i, groups, tiles, *_: (tiles[i], 0)),
        pl.BlockSpec((None, *strip), lambda j, i, groups, *_: place(groups[i], j)),
    ]
    add = functools.partial(_add_product, depth=t.depth, dimensions=dimensions)
    work, total = items.of_rows(sizes, alignment, m, t.rows), (t.rows, t.columns)
    return _by_rows(add, lambda total: total, total, specs, (x, w), (m, n), x.dtype, work, t, interpret)


def _by_rows(
    add: Callable,
    turn: Callable,
    total_shape: tuple[int, int],
    specs,
    operands,
    shape,
    dtype,
    work: items.Items,
    t: tuning.Tiles,
    interpret,
):
    """Calls `add(total, *blocks)` for each strip of columns and item, and stores the rows of its group.

    The result is what `turn` makes of the total.
    """

    def kernel(groups, tiles, starts, ends, *refs):
        *blocks, out, total = refs
        item = pl.program_id(1)
        total[...] = jnp.zeros(total.shape, total.dtype)
        add(total, *blocks)
        row = tiles[item] * t.rows + jax.lax.broadcasted_iota(jnp.int32, (t.rows, 1), 0)
        mine = (row >= starts[groups[item]]) & (row < ends[groups[item]])
        # The items of one tile follow each other, so what an earlier group stored is still here.
        out[...] = jnp.where(mine, turn(total[...]).astype(dtype), out[...])

    grid = (pl.cdiv(shape[1], t.columns), work.number)
    out_spec = pl.BlockSpec((t.rows, t.columns), lambda j, i, groups, tiles, *_: (tiles[i], j))
    return _call(kernel, grid, specs, out_spec, work, operands, shape, dtype, total_shape, {}, interpret)


def _by_groups(
    add: Callable, specs, operands, shape, dtype, work: items.Items, t: tuning.Tiles, into, interpret
):
    """Calls `add(total, tile, first, end, *blocks)` for each tile of results and each item, whose group has
    the rows from `first` to `end` of the tile, and stores the total when the group ends."""

    def kernel(groups, tiles, starts, ends, *refs):
        blocks, out, total = refs[: len(specs)], *refs[-2:]
        item, group = pl.program_id(2), groups[pl.program_id(2)]

        @pl.when((item == 0) | (group != groups[jnp.maximum(item - 1, 0)]))
        def _():
            total[...] = jnp.zeros(total.shape, total.dtype) if into is None else refs[len(specs)][...]

        first = tiles[item] * t.depth
        add(total, tiles[item], starts[group] - first, ends[group] - first, *blocks)

        @pl.when((item == pl.num_programs(2) - 1) | (group != groups[item + 1]))
        def _():
            out[...] = total[...].astype(dtype)

    grid = (pl.cdiv(shape[1], t.rows), pl.cdiv(shape[2], t.columns), work.number)
    out_spec = pl.BlockSpec((None, t.rows, t.columns), lambda a, b, i, groups, *_: (groups[i], a, b))
    if into is None:
        return _call(kernel, grid, specs, out_spec, work, operands, shape, dtype, t[:2], {}, interpret)
    aliases = {4 + len(operands): 0}
    specs_of_all, operands = [*specs, out_spec], (*operands, into)
    return _call(
        kernel, grid, specs_of_all, out_spec, work, operands, shape, dtype, t[:2], aliases, interpret
    )


def _call(
    kernel, grid, specs, out_spec, work: items.Items, operands, shape, dtype, total, aliases, interpret
):
    out = out_like(shape, dtype, work, operands)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=specs,
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(total, jnp.float32)],
        ),
        out_shape=out,
        cost_estimate=cost(2 * operands[0].size * shape[-1], operands, out),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=[*(pltpu.PARALLEL,) * (len(grid) - 1), pltpu.ARBITRARY], vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
    )(*work[:4], *operands)


def _add_product(total, x, w, *, depth: int, dimensions):
    def step(c, _):
        at = pl.ds(pl.multiple_of(c * depth, depth), depth)
        total[...] += _dot(x[:, at], w[at, :] if dimensions == MATRIX else w[:, at], dimensions)

    jax.lax.fori_loop(0, x.shape[1] // depth, step, None)


def _add_every_depth(total, x, x_scales, w, w_scales, *, depth: int, tile: int, rows: int):
    columns = total.shape[0]

    def step(c, _):
        at = pl.ds(pl.multiple_of(c * depth, depth), depth)
        x_part, w_part = x[:, at], w[:, at]
        for s in range(depth // tile):
            here = slice(s * tile, (s + 1) * tile)
            product = _dot(w_part[:, here], x_part[:, here], COLUMNS)
            for first in range(0, columns, LANES):
                strip = slice(first, min(first + LANES, columns))
                row = jax.lax.div(pl.program_id(0) * columns + first, rows)
                scale = w_scales[jnp.minimum(row, w_scales.shape[0] - 1), c * (depth // tile) + s]
                total[strip] += product[strip] * (x_scales[c, s : s + 1] * scale)

    jax.lax.fori_loop(0, x.shape[1] // depth, step, None)


def _rotated(scales, first):
    """Scales of rows with column `first` (modulo their number) moved to the front."""
    lanes = scales.shape[1]
    return pltpu.roll(scales[...], jax.lax.rem(lanes - jax.lax.rem(first, lanes), lanes), 1)


def _add_scaled(total, x, x_scales, y, y_scales, tile: int):
    """Adds x [R, D] times y [C, D] transposed, each tile of D times its scales in FP32."""
    for s in range(x.shape[1] // tile):
        at = slice(s * tile, (s + 1) * tile)
        product = _dot(x[:, at], y[:, at], COLUMNS)
        total[...] += product * x_scales[:, s : s + 1] * y_scales[s : s + 1]


def _add_rows(total, tile, first, end, x, g, *, depth: int):
    del tile  # whose rows these are does not matter
    whole = (first <= 0) & (end >= depth)

    @pl.when(whole)
    def _():
        total[...] += _dot(x[...], g[...], ROWS)

    @pl.when(jnp.logical_not(whole))
    def _():
        row = jax.lax.broadcasted_iota(jnp.int32, (depth, 1), 0)
        mine = (row >= first) & (row < end)
        keep = lambda a: jnp.where(mine, a[...], jnp.zeros((), a.dtype))  # noqa: E731
        total[...] += _dot(keep(x), keep(g), ROWS)


def _add_columns(total, index, first, end, x, x_scales, y, y_scales, *, tile: int):
    each = x.shape[1] // tile
    whole = (first <= 0) & (end > x.shape[1] - tile)

    @pl.when(whole)
    def _():
        _add_scaled(total, x[...], _rotated(x_scales, index * each), y[...], y_scales[...], tile)

    @pl.when(jnp.logical_not(whole))
    def _():
        def step(s, _):
            at = pl.ds(pl.multiple_of(s * tile, tile), tile)
            scales = _rotated(x_scales, index * each + s)
            _add_scaled(total, x[:, at], scales, y[:, at], y_scales[pl.ds(s, 1)], tile)

        last = jax.lax.div(jnp.minimum(end, x.shape[1]) + tile - 1, tile)
        jax.lax.fori_loop(jax.lax.div(jnp.maximum(first, 0), tile), last, step, None)


def _dot(a, b, dimensions):
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _whole_tiles(x: Scaled) -> Scaled:
    """Fills a partial last tile of columns with zeros: blocks past an array would hold garbage."""
    missing = x.scales.shape[-1] * x.tile[1] - x.shape[-1]
    padding = ((0, 0),) * (len(x.shape) - 1) + ((0, missing),)
    return x if missing == 0 else Scaled(jnp.pad(x.values, padding), x.scales, x.tile)


def _lanes(scales: Float32[Array, "R T"]) -> Float32[Array, "R TP"]:
    """Fills rows up to whole registers, as which they lie in memory anyway."""
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % LANES)))


def _divisor(size: int, most: int, unit: int) -> int:
    """The largest multiple of a unit and of 128 that divides a size and is at most so much, else the size."""
    fits = [d for d in range(LANES, min(size, most) + 1, LANES) if size % d == 0 and d % unit == 0]
    return max(fits, default=size)
