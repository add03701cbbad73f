"""Quantisation on Hopper: tiles come and go by TMA, and one warpgroup turns each into E4M3 in registers.

There is little to compute for each byte. So a program copies all that it works on when it starts, and several
of them on each multiprocessor keep memory busy; none reuses its shared memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import hopper
from pallas_kernels.quantize.reference import TILE, swiglu_gradients
from pallas_kernels.scaled import E4M3, Scale, Scaled, exact, tiles
from pallas_kernels.support import out_like

ROWS = 64  # of a tile of the result: registers hold it in FP32
LINE = 64  # columns whose bytes are swizzled together; all matrices must be whole lines, in jax 0.11
_kernel_entry = partial(jax.jit, static_argnames=("scale", "interpret"))


def serves(*sizes: int) -> bool:
    """Whether rows of so many columns are whole swizzled lines."""
    return all(size % LINE == 0 for size in sizes)


@_kernel_entry
def quantize(x: Float[Array, "M K"], scale: Scale = exact, *, interpret=None) -> Scaled:
    """The definition's, in tiles of one row."""
    return _run(_numbers(x), _BY_ROW, scale, interpret)


@_kernel_entry
def blocks(x: Float[Array, "M K"], scale: Scale = exact, *, interpret=None) -> Scaled:
    """The definition's, in tiles of 128 x 128, which are a program each."""
    (rows, columns), grid = x.shape, (tiles(x.shape[0], TILE), tiles(x.shape[1], TILE))
    # Each scale as often as there are rows of half a tile: TMA writes no single number.
    results = [out_like((rows, columns), E4M3, x), out_like((*grid, ROWS), jnp.float32, x)]
    values, scales = launch(partial(_block_kernel, scale=scale), grid, results, interpret)(x)
    return Scaled(values, scales[:, :, 0], (TILE, TILE))


@_kernel_entry
def transposed(x: Float[Array, "M K"] | Scaled, scale: Scale = exact, *, interpret=None) -> Scaled:
    """The definition's, in tiles of 128 tokens."""
    return _run(_numbers(x), _BY_COLUMN, scale, interpret)


@_kernel_entry
def swiglu(
    hidden: Float[Array, "M 2F"] | Scaled,
    weights: Float[Array, " M"] | None,
    scale: Scale = exact,
    *,
    interpret=None,
) -> Scaled:
    """The definition's."""
    return _run(_activation(hidden, weights), _BY_ROW, scale, interpret)


@_kernel_entry
def swiglu_transposed(
    hidden: Float[Array, "M 2F"] | Scaled,
    weights: Float[Array, " M"] | None,
    scale: Scale = exact,
    *,
    interpret=None,
) -> Scaled:
    """The definition's."""
    return _run(_activation(hidden, weights), _BY_COLUMN, scale, interpret)


@partial(jax.jit, static_argnames="interpret")
def swiglu_backward(
    hidden: Float[Array, "M 2F"] | Scaled,
    weights: Float[Array, " M"] | None,
    g: Float[Array, "M F"],
    *,
    interpret=None,
) -> tuple[Float[Array, "M 2F"], Float32[Array, " M"] | None]:
    """The definition's, where F is a multiple of 128; sums are in another order."""
    source = _halves(hidden, weights, _gradients)
    source = source._replace(parts=[*source.parts, (g, 0)])
    (rows, columns), operands = source.shape, source.operands
    results = [out_like((rows, 2 * columns), g.dtype, *operands)]
    if weights is not None:
        results.append(out_like((columns // TILE, tiles(rows, 4) * 4), jnp.float32, *operands))
    kernel = partial(_backward_kernel, source=source)
    dhidden, *dweights = _launch(kernel, source, _STRIP, 1, results, interpret)
    return dhidden, jnp.sum(dweights[0][:, :rows], axis=0) if dweights else None


class _Way(NamedTuple):
    """How tokens and features lie in a tile of the result, with a scale for each row."""

    tokens: int
    features: int
    axis: int  # of tokens in the result
    factors: plgpu.Layout  # of one number for each token
    load: Callable[[Any], Array]

    def window(self, i, group) -> tuple:
        """Tokens and features of one tile."""
        place = (i, group)
        return (
            pl.ds(place[self.axis] * self.tokens, self.tokens),
            pl.ds(place[1 - self.axis] * self.features, self.features),
        )

    def spread(self, factors) -> Array:
        shape = (self.tokens, self.features)
        return lax.broadcast_in_dim(factors, (shape[self.axis], shape[1 - self.axis]), [self.axis])


def _load_transposed(ref) -> Array:
    """In pairs that are neighbours in memory, which then move to where pairs of a row belong."""
    pairs = hopper.load(ref.T, plgpu.Layout.WGMMA_TRANSPOSED)
    if pairs.dtype == E4M3:  # whose layouts are not exchanged; all of it is in FP16
        pairs = pairs.astype(jnp.float16)
    return plgpu.layout_cast(pairs, plgpu.Layout.WGMMA)


_BY_ROW = _Way(ROWS, TILE, 0, hopper.ROWS, lambda ref: hopper.load(ref, plgpu.Layout.WGMMA))
_BY_COLUMN = _Way(TILE, ROWS, 1, hopper.COLUMNS, _load_transposed)

_STRIP = _BY_ROW._replace(features=LINE)  # half a tile: registers hold three of them


class _Source(NamedTuple):
    """A matrix that is computed from others with the same rows, a tile at a time."""

    shape: tuple[int, int]
    parts: list[tuple[Array, int]]  # with the column of each that goes with the first of the result
    lines: list[tuple[Float32[Array, "L M"], int]]  # factors of rows: one line, or for each 128 columns
    piece: Callable[[list[Array], list[Array]], Array]  # of FP32 tiles of the parts, and factors of rows

    @property
    def operands(self) -> list[Array]:
        return [part for part, _ in self.parts] + [aligned(line) for line, _ in self.lines]

    def windows(self, tokens, features) -> list[tuple]:
        """Of a tile, in each operand."""
        group = lax.div(features.start, TILE)
        parts = [(tokens, pl.ds(features.start + first, features.size)) for _, first in self.parts]
        return parts + [(group + first if len(line) > 1 else 0, tokens) for line, first in self.lines]

    def buffers(self, many: int, way: _Way) -> list:
        """Shared memory for tiles of each operand."""
        part = lambda dtype: plgpu.SMEM(  # noqa: E731
            (many, way.tokens, way.features), dtype, transforms=hopper.swizzled(LINE, dtype)
        )
        lines = [plgpu.SMEM((many, way.tokens), jnp.float32) for _ in self.lines]
        return [part(array.dtype) for array, _ in self.parts] + lines


def _numbers(x: Array | Scaled) -> _Source:
    if isinstance(x, Scaled):
        return _Source(x.shape, [(x.values, 0)], [(x.scales.T, 0)], lambda x, scales: x[0] * scales[0])
    return _Source(x.shape, [(x, 0)], [], lambda x, _: x[0])


def _halves(hidden: Array | Scaled, weights: Array | None, piece: Callable) -> _Source:
    """What `piece` makes of gate, up, other parts and the weights of rows, if there are any."""
    rows, columns = hidden.shape[0], hidden.shape[1] // 2
    scaled = isinstance(hidden, Scaled)
    values = hidden.values if scaled else hidden
    lines = [(hidden.scales.T, 0), (hidden.scales.T, columns // TILE)] if scaled else []
    scales = len(lines)
    if weights is not None:
        lines.append((weights.astype(jnp.float32)[None], 0))

    def of_halves(parts, factors):
        halves = [p * f for p, f in zip(parts, factors[:scales], strict=False)] or parts[:2]
        return piece(*halves, *parts[2:], *factors[scales:])

    return _Source((rows, columns), [(values, 0), (values, columns)], lines, of_halves)


def _activation(hidden: Array | Scaled, weights: Array | None) -> _Source:
    def piece(gate, up, *weight):
        y = gate * _sigmoid(gate) * up
        return y * weight[0] if weight else y

    return _halves(hidden, weights, piece)


def _gradients(gate, up, g, weight=None) -> tuple[Array, Array, Array]:
    return swiglu_gradients(gate, up, g, weight, _sigmoid(gate))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + jnp.exp(-x))


def aligned(line: Float32[Array, "L M"]) -> Float32[Array, "L M4"]:
    """Rows of whole 16 bytes, which TMA needs."""
    return jnp.pad(line, ((0, 0), (0, -line.shape[1] % 4)))


def _run(source: _Source, way: _Way, scale: Scale, interpret) -> Scaled:
    rows, columns = source.shape if way.axis == 0 else source.shape[::-1]
    groups = tiles(columns, TILE)
    many = 2 if groups % 2 == 0 else 1  # tiles of a program
    results = [
        out_like((rows, columns), E4M3, *source.operands),
        out_like((groups, tiles(rows, 4) * 4), jnp.float32, *source.operands),
    ]
    kernel = partial(_kernel, source=source, way=way, scale=scale, many=many)
    values, scales = _launch(kernel, source, way, many, results, interpret)
    return Scaled(values, scales[:, :rows].T, (1, TILE))


def _launch(kernel: Callable, source: _Source, way: _Way, many: int, results: list, interpret) -> list[Array]:
    """Runs a program for each 64 rows and so many tiles of 128 columns."""
    rows, columns = source.shape if way.axis == 0 else source.shape[::-1]
    grid = tiles(rows, ROWS), tiles(columns, TILE) // many
    return launch(kernel, grid, results, interpret)(*source.operands)


def launch(kernel: Callable, grid: tuple[int, int], results, interpret) -> Callable:
    """A function of device arrays that runs a program for each of so many rows and columns of tiles."""
    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=grid,
        grid_names=("row", "column"),
        compiler_params=hopper.compiler_params(),
        **({} if interpret is None else {"interpret": interpret}),
    )


def _kernel(*refs, source: _Source, way: _Way, scale: Scale, many: int):
    """One program: some tiles of the same rows of the result."""
    *operands, values, scales = refs
    i, first = lax.axis_index("row"), lax.axis_index("column") * many

    @partial(
        pl.run_scoped,
        buffers=source.buffers(many, way),
        results=plgpu.SMEM((many, ROWS, TILE), E4M3, transforms=hopper.swizzled(LINE, E4M3)),
        of_rows=plgpu.SMEM((many, ROWS), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=len(operands), num_barriers=many),
    )
    def _(buffers, results, of_rows, arrived):
        _fetch(source, way, operands, (i, first), buffers, arrived)

        @pl.loop(0, many)
        def _(t):
            piece = _read(source, way, buffers, arrived, t)
            of_row = scale(jnp.max(jnp.abs(piece), axis=1))
            factor = lax.broadcast_in_dim(1 / of_row, (ROWS, TILE), [0])
            results[t] = (piece * factor).astype(E4M3)
            of_rows[t] = of_row
            plgpu.commit_smem()
            rows = pl.ds(i * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(results.at[t], values.at[rows, pl.ds((first + t) * TILE, TILE)])
            plgpu.copy_smem_to_gmem(of_rows.at[t], scales.at[first + t, rows])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _block_kernel(x, values, scales, *, scale: Scale):
    """One program: a tile, of which registers hold both halves until its largest magnitude is known."""
    i, j = lax.axis_index("row"), lax.axis_index("column")
    window = lambda half: (pl.ds(i * TILE + half * ROWS, ROWS), pl.ds(j * TILE, TILE))  # noqa: E731

    @partial(
        pl.run_scoped,
        halves=plgpu.SMEM((2, ROWS, TILE), x.dtype, transforms=hopper.swizzled(LINE, x.dtype)),
        results=plgpu.SMEM((2, ROWS, TILE), E4M3, transforms=hopper.swizzled(LINE, E4M3)),
        of_rows=plgpu.SMEM((ROWS,), jnp.float32),
        of_tile=plgpu.SMEM((ROWS,), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=2),
    )
    def _(halves, results, of_rows, of_tile, arrived):
        for half in range(2):
            plgpu.copy_gmem_to_smem(x.at[window(half)], halves.at[half], arrived)
        plgpu.barrier_wait(arrived)
        pieces = [hopper.load(halves.at[h], plgpu.Layout.WGMMA).astype(jnp.float32) for h in range(2)]
        of_rows[...] = jnp.maximum(*(jnp.abs(piece) for piece in pieces)).max(axis=1)
        plgpu.commit_smem()
        # What was one number for each row is one for each column here, so that each row sees all.
        every = lax.broadcast_in_dim(hopper.load(of_rows, hopper.COLUMNS), (ROWS, ROWS), [1])
        of_each = scale(every.max(axis=1))
        factor = lax.broadcast_in_dim(1 / of_each, (ROWS, TILE), [0])
        of_tile[...] = of_each
        for half, piece in enumerate(pieces):
            results[half] = (piece * factor).astype(E4M3)
        plgpu.commit_smem()
        for half in range(2):
            plgpu.copy_smem_to_gmem(results.at[half], values.at[window(half)])
        plgpu.copy_smem_to_gmem(of_tile, scales.at[i, j])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _backward_kernel(*refs, source: _Source):
    """One program: 64 rows of 128 columns, a strip at a time."""
    operands = refs[: len(source.parts) + len(source.lines)]
    out, *dweights = refs[len(operands) :]
    i, group, strips = lax.axis_index("row"), lax.axis_index("column"), TILE // LINE

    @partial(
        pl.run_scoped,
        buffers=source.buffers(strips, _STRIP),
        results=plgpu.SMEM((strips, 2, ROWS, LINE), out.dtype, transforms=hopper.swizzled(LINE, out.dtype)),
        of_rows=plgpu.SMEM((ROWS,), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=len(operands), num_barriers=strips),
    )
    def _(buffers, results, of_rows, arrived):
        _fetch(source, _STRIP, operands, (i, group * strips), buffers, arrived)
        rows, total = pl.ds(i * ROWS, ROWS), 0.0
        for t in range(strips):
            *gradients, dweight = _read(source, _STRIP, buffers, arrived, t)
            total += dweight.sum(axis=1)
            for half, gradient in enumerate(gradients):
                results[t, half] = gradient.astype(out.dtype)
        if dweights:
            of_rows[...] = total
        plgpu.commit_smem()
        for t in range(strips):
            for half in range(2):
                first = half * source.shape[1] + (group * strips + t) * LINE
                plgpu.copy_smem_to_gmem(results.at[t, half], out.at[rows, pl.ds(first, LINE)])
        for sums in dweights:
            plgpu.copy_smem_to_gmem(of_rows, sums.at[group, rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _fetch(source: _Source, way: _Way, operands, place: tuple, buffers: list, arrived) -> None:
    """Starts to copy a program's tiles, from that at a row and a column of tiles on."""
    i, first = place
    for t in range(arrived.shape[0]):
        windows = source.windows(*way.window(i, first + t))
        for operand, window, buffer in zip(operands, windows, buffers, strict=True):
            plgpu.copy_gmem_to_smem(operand.at[window], buffer.at[t], arrived.at[t])


def _read(source: _Source, way: _Way, buffers: list, arrived, t):
    """What a source computes of its tile t, once that is there."""
    plgpu.barrier_wait(arrived.at[t])
    parts = [way.load(part.at[t]).astype(jnp.float32) for part in buffers[: len(source.parts)]]
    lines = [hopper.load(line.at[t], way.factors) for line in buffers[len(source.parts) :]]
    return source.piece(parts, [way.spread(line) for line in lines])
