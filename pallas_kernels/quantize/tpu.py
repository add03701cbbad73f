"""Quantisation on TPU: each block is read once, and written once in its final form.

Chips before tpu7x have no instruction that makes E4M3; for them the compiler emits integer arithmetic.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.quantize import tuning
from pallas_kernels.quantize.reference import TILE, swiglu_gradients
from pallas_kernels.quantize.tuning import LANES
from pallas_kernels.scaled import E4M3, Scale, Scaled, exact, tiles
from pallas_kernels.support import out_like

Block = tuple[int, int]  # rows and columns that a step of a kernel reads
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tuning.TPU_VMEM)
_kernel_entry = partial(jax.jit, static_argnames=("scale", "block", "interpret"))


def serves(columns: int) -> bool:
    """Whether 128 rows of so many columns that are read, and what becomes of them, fit in memory."""
    return tuning.tpu_fits(columns)


@_kernel_entry
def quantize(
    x: Float[Array, "M K"], scale: Scale = exact, *, block: Block | None = None, interpret=False
) -> Scaled:
    """The definition's, in tiles of one row."""
    return _by_row(_numbers(x), scale, block, interpret)


@partial(jax.jit, static_argnames=("scale", "interpret"))
def blocks(x: Float[Array, "M K"], scale: Scale = exact, *, interpret=False) -> Scaled:
    """The definition's, in tiles of 128 x 128; a step reads 128 whole rows."""
    (m, k), groups = x.shape, tiles(x.shape[1], TILE)
    rows = pl.BlockSpec((TILE, k), lambda i, j: (i, 0))
    values, scales = pl.pallas_call(
        partial(_block_kernel, m=m, scale=scale),
        grid=(pl.cdiv(m, TILE), 1),
        in_specs=[rows],
        # Each scale in all lanes: one number could not be stored at a place that a loop counts.
        out_specs=[rows, pl.BlockSpec((None, groups, LANES), lambda i, j: (i, 0, 0))],
        out_shape=[out_like((m, k), E4M3, x), out_like((pl.cdiv(m, TILE), groups, LANES), jnp.float32, x)],
        compiler_params=_PARAMS,
        interpret=interpret,
    )(x)
    return Scaled(values, scales[:, :, 0], (TILE, TILE))


@_kernel_entry
def transposed(
    x: Float[Array, "M K"] | Scaled, scale: Scale = exact, *, block: Block | None = None, interpret=False
) -> Scaled:
    """The definition's, in tiles of 128 tokens."""
    return _by_column(_numbers(x), scale, block, interpret)


@_kernel_entry
def swiglu(
    hidden: Float[Array, "M 2F"] | Scaled,
    weights: Float[Array, " M"] | None,
    scale: Scale = exact,
    *,
    block: Block | None = None,
    interpret=False,
) -> Scaled:
    """The definition's, where F is a multiple of 128."""
    return _by_row(_activation(hidden, weights), scale, block, interpret)


@_kernel_entry
def swiglu_transposed(
    hidden: Float[Array, "M 2F"] | Scaled,
    weights: Float[Array, " M"] | None,
    scale: Scale = exact,
    *,
    block: Block | None = None,
    interpret=False,
) -> Scaled:
    """The definition's, where F is a multiple of 128."""
    return _by_column(_activation(hidden, weights), scale, block, interpret)


@partial(jax.jit, static_argnames=("rows", "interpret"))
def swiglu_backward(
    hidden: Float[Array, "M 2F"] | Scaled,
    weights: Float[Array, " M"] | None,
    g: Float[Array, "M F"],
    *,
    rows: int | None = None,
    interpret=False,
) -> tuple[Float[Array, "M 2F"], Float32[Array, " M"] | None]:
    """The definition's, where F is a multiple of 128; sums are in another order."""
    source = _halves(hidden, weights, _gradients)
    source = source._replace(parts=[*source.parts, (g, 0)])
    (m, k), weighted = source.shape, weights is not None
    block = (rows or tuning.tpu_rows(m, source.bytes_of_row), k)
    operands = source.operands(k)
    specs = [pl.BlockSpec((block[0], 2 * k), lambda i, j: (i, 0))]
    shapes = [out_like((m, 2 * k), g.dtype, *operands)]
    if weighted:
        specs.append(pl.BlockSpec((1, block[0]), lambda i, j: (0, i)))
        shapes.append(out_like((1, m), jnp.float32, *operands))
    dhidden, *dweights = pl.pallas_call(
        partial(_backward_kernel, source=source, results=len(shapes)),
        grid=(pl.cdiv(m, block[0]), 1),
        in_specs=source.specs(block),
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((block[0], LANES), jnp.float32), *source.scratch(block)],
        compiler_params=_PARAMS,
        interpret=interpret,
    )(*operands)
    return dhidden, dweights[0][0] if weighted else None


class _Lines(NamedTuple):
    """Factors of rows, along lanes: one line for each 128 columns, or one for all."""

    values: Float32[Array, "L M"]

    def groups(self, columns: int) -> int:
        """Lines that so many columns need."""
        return 1 if len(self.values) == 1 else tiles(columns, LANES)

    def operand(self, columns: int) -> Float32[Array, "J G M"]:
        """The lines of each block of columns, of whole vectors."""
        groups, (lines, rows) = self.groups(columns), self.values.shape
        whole = jnp.pad(self.values, ((0, -lines % groups), (0, -rows % LANES)))
        return whole.reshape(-1, groups, whole.shape[1])

    def spec(self, block: Block) -> pl.BlockSpec:
        shared = len(self.values) == 1
        return pl.BlockSpec(
            (None, self.groups(block[1]), _whole(block[0])), lambda i, j: (0 if shared else j, 0, i)
        )

    def scratch(self, block: Block):
        """For each row, its factor in all lanes."""
        return pltpu.VMEM((self.groups(block[1]), _whole(block[0]), LANES), jnp.float32)


class _Source(NamedTuple):
    """A matrix that is computed from others with the same rows, 128 columns at a time."""

    shape: tuple[int, int]
    parts: list[tuple[Array, int]]  # with the column of each that goes with the first of the result
    lines: list[_Lines]
    piece: Callable[[list[Array], list[Array]], Array]  # of FP32 pieces of the parts, and factors of rows

    @property
    def bytes_of_row(self) -> int:
        return sum(self.shape[1] * part.dtype.itemsize for part, _ in self.parts)

    def operands(self, columns: int) -> list[Array]:
        return [part for part, _ in self.parts] + [line.operand(columns) for line in self.lines]

    def specs(self, block: Block) -> list[pl.BlockSpec]:
        part = lambda first: pl.BlockSpec(block, lambda i, j: (i, first // block[1] + j))  # noqa: E731
        return [part(first) for _, first in self.parts] + [line.spec(block) for line in self.lines]

    def scratch(self, block: Block) -> list:
        return [line.scratch(block) for line in self.lines]

    def reader(self, refs, spread) -> Callable:
        """Spreads the factors of a block, then reads it."""
        parts, lines = refs[: len(self.parts)], refs[len(self.parts) :]
        for line, factors in zip(lines, spread, strict=True):
            for g in range(factors.shape[0]):
                factors[g] = jnp.broadcast_to(line[g : g + 1, :], (LANES, line.shape[1])).T

        def read(rows, columns, group) -> Float32[Array, "R C"]:
            pieces = [part[rows, columns].astype(jnp.float32) for part in parts]
            width = pieces[0].shape[1]
            return self.piece(pieces, [f[0 if f.shape[0] == 1 else group, rows, :width] for f in spread])

        return read


def _numbers(x: Array | Scaled) -> _Source:
    shape = x.shape[0], x.shape[1]
    if isinstance(x, Scaled):
        return _Source(shape, [(x.values, 0)], [_Lines(x.scales.T)], lambda x, scales: x[0] * scales[0])
    return _Source(shape, [(x, 0)], [], lambda x, _: x[0])


def _halves(hidden: Array | Scaled, weights: Array | None, piece: Callable) -> _Source:
    """What `piece` makes of gate, up and the weights of rows, if there are any."""
    columns = hidden.shape[1] // 2
    lines = [_Lines(s) for s in jnp.split(hidden.scales.T, 2)] if isinstance(hidden, Scaled) else []
    values = hidden.values if isinstance(hidden, Scaled) else hidden
    scaled = len(lines)
    if weights is not None:
        lines.append(_Lines(weights.astype(jnp.float32)[None]))

    def of_halves(parts, factors):
        halves = [part * f for part, f in zip(parts, factors[:scaled], strict=False)] or parts
        return piece(*halves[:2], *parts[2:], *factors[scaled:])

    return _Source((hidden.shape[0], columns), [(values, 0), (values, columns)], lines, of_halves)


def _activation(hidden: Array | Scaled, weights: Array | None) -> _Source:
    def piece(gate, up, *weight):
        y = jax.nn.silu(gate) * up
        return y * weight[0] if weight else y

    return _halves(hidden, weights, piece)


def _by_row(source: _Source, scale: Scale, block: Block | None, interpret) -> Scaled:
    m, k = source.shape
    block = block or (tuning.tpu_rows(m, source.bytes_of_row), k)
    groups = tiles(k, TILE)
    whole = lambda columns: pl.BlockSpec((block[0], columns), lambda i, j: (i, 0))  # noqa: E731
    operands = source.operands(k)
    values, scales = pl.pallas_call(
        partial(_row_kernel, source=source, scale=scale),
        grid=(pl.cdiv(m, block[0]), 1),
        in_specs=source.specs(block),
        out_specs=[whole(k), whole(groups)],
        out_shape=[out_like((m, k), E4M3, *operands), out_like((m, groups), jnp.float32, *operands)],
        scratch_shapes=source.scratch(block),
        compiler_params=_PARAMS,
        interpret=interpret,
    )(*operands)
    return Scaled(values, scales, (1, TILE))


def _row_kernel(*refs, source: _Source, scale: Scale):
    """Some whole rows, a few at a time."""
    many = len(source.parts) + len(source.lines)
    values, scales = refs[many : many + 2]
    read = source.reader(refs[:many], refs[many + 2 :])
    rows, columns = values.shape

    def chunk(_, some):
        for g in range(scales.shape[1]):
            part = slice(g * TILE, min((g + 1) * TILE, columns))
            piece = read(some, part, g)
            of_row = scale(jnp.max(jnp.abs(piece), axis=1, keepdims=True))
            scales[some, g : g + 1] = of_row
            values[some, part] = (piece * (1 / of_row)).astype(E4M3)

    each(rows, tuning.tpu_chunk(scales.shape[1]), chunk)


def _block_kernel(x, values, scales, *, m: int, scale: Scale):
    """128 rows, 128 columns at a time."""

    def square(group, some):
        piece = _before_end(x[:, some].astype(jnp.float32), m, TILE)
        of_square = scale(jnp.max(jnp.abs(piece), axis=(0, 1), keepdims=True))
        scales[pl.ds(group, 1)] = jnp.broadcast_to(of_square, (1, LANES))
        values[:, some] = (piece * (1 / of_square)).astype(E4M3)

    each(x.shape[1], TILE, square)


def _before_end(piece: Float32[Array, "R C"], m: int, rows: int, first: int = 0) -> Float32[Array, "R C"]:
    """A piece of this step's rows, from `first` on, with zeros past m, where memory holds anything."""
    if m % TILE == 0:
        return piece
    row = lax.broadcasted_iota(jnp.int32, piece.shape, 0)
    return jnp.where(row < m - pl.program_id(0) * rows - first, piece, 0)


def _by_column(source: _Source, scale: Scale, block: Block | None, interpret) -> Scaled:
    m, k = source.shape
    rows, columns = block or tuning.tpu_transposed(m, k)
    groups = tiles(rows, TILE)
    operands = source.operands(columns)
    values, scales = pl.pallas_call(
        partial(_column_kernel, source=source, scale=scale),
        grid=(pl.cdiv(m, rows), pl.cdiv(k, columns)),
        in_specs=source.specs((rows, columns)),
        out_specs=[
            pl.BlockSpec((columns, rows), lambda i, j: (j, i)),
            pl.BlockSpec((None, groups, columns), lambda i, j: (i, 0, j)),
        ],
        out_shape=[
            out_like((k, m), E4M3, *operands),
            out_like((pl.cdiv(m, rows), groups, k), jnp.float32, *operands),
        ],
        scratch_shapes=source.scratch((rows, columns)),
        compiler_params=_PARAMS,
        interpret=interpret,
    )(*operands)
    return Scaled(values, scales.reshape(-1, k)[: tiles(m, TILE)].T, (1, TILE))


def _gradients(gate, up, g, weight=None) -> tuple[Array, Array, Array]:
    return swiglu_gradients(gate, up, g, weight, jax.nn.sigmoid(gate))


def _backward_kernel(*refs, source: _Source, results: int):
    """Some whole rows, 128 columns at a time."""
    many = len(source.parts) + len(source.lines)
    out, *dweights = refs[many : many + results]
    total, *spread = refs[many + results :]
    read = source.reader(refs[:many], spread)
    rows, columns = total.shape[0], source.shape[1]
    total[...] = jnp.zeros_like(total)

    def strip(group, some):
        up = pl.ds(columns + group * LANES, LANES)
        for first in range(0, rows, tuning.TPU_BACKWARD_ROWS):
            part = slice(first, min(first + tuning.TPU_BACKWARD_ROWS, rows))
            dgate, dup, dweight = read(part, some, group)
            out[part, some] = dgate.astype(out.dtype)
            out[part, up] = dup.astype(out.dtype)
            total[part] += dweight

    each(columns, LANES, strip)
    for sums in dweights:
        sums[...] = jnp.sum(total[...].T, axis=0, keepdims=True)


def _column_kernel(*refs, source: _Source, scale: Scale):
    """One block, 128 columns at a time."""
    many = len(source.parts) + len(source.lines)
    values, scales = refs[many : many + 2]
    read = source.reader(refs[:many], refs[many + 2 :])
    columns, rows = values.shape

    def strip(group, some):
        for t in range(scales.shape[0]):
            part = slice(t * TILE, min((t + 1) * TILE, rows))
            piece = _before_end(read(part, some, group), source.shape[0], rows, t * TILE)
            of_column = scale(jnp.max(jnp.abs(piece), axis=0, keepdims=True))
            scales[t : t + 1, some] = of_column
            values[some, part] = (piece * (1 / of_column)).astype(E4M3).T

    each(columns, TILE, strip)


def each(size: int, step: int, visit: Callable) -> None:
    """Calls visit(index, window) for windows that cover a size, the last of which may be shorter."""
    if size // step == 1:
        visit(0, slice(0, step))
    elif size >= step:
        pl.loop(0, size // step)(lambda i: visit(i, pl.ds(pl.multiple_of(i * step, step), step)))
    if size % step:
        visit(size // step, slice(size - size % step, size))


def _whole(size: int) -> int:
    """In whole vectors."""
    return tiles(size, LANES) * LANES
