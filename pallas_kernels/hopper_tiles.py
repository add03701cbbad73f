"""What kernels of scaled products on Hopper are told: tiles, the order in which programs take them, and
operands in layouts that can be copied from."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

K = 128  # columns between promotions, and of a scale
TILE_ROWS = 128  # of the result
LINE = 128 // 4  # FP32 numbers in the bytes that a copy into shared memory is aligned to
X, W = 0, 1  # what the programs of a cluster may share
_SHARED_MEMORY = 232448 - 1024  # bytes of a block of threads, less barriers


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work."""

    columns: int  # of a tile of the result
    stages: int  # blocks of 128 of K in shared memory
    flight: int  # blocks of K that a warpgroup multiplies at once: while one is added, the next is multiplied
    sharing: int = 1  # blocks of threads that read each block of one operand from memory together

    @classmethod
    def filling(cls, columns: int, flight: int, sharing: int, dtype, scales: int = LINE) -> "Tiles":
        """As many stages as shared memory holds, each with so many scales of w."""
        result = TILE_ROWS * columns * jnp.dtype(dtype).itemsize
        stage = (TILE_ROWS + columns) * K + 4 * (TILE_ROWS + scales)
        return cls(columns, min(8, (_SHARED_MEMORY - result) // stage), flight, sharing)


class Place(NamedTuple):
    """A tile of the result, and the blocks of K that it sums."""

    row: Any
    column: Any
    first: Any
    steps: Any  # a multiple of the tiles' flight
    of_w: tuple = ()  # which matrix, where there are several
    of_out: tuple = ()

    def result(self, rows: int, start, columns: int) -> tuple:
        """The window of some of the tile's rows."""
        return *self.of_out, pl.ds(self.row * TILE_ROWS + start, rows), pl.ds(self.column * columns, columns)


class Walk(NamedTuple):
    """The tiles that programs, or clusters of programs, take in turn."""

    number: Any
    place: Callable[[Any], Place]  # of a tile of that number
    shared: int  # X or W

    def each(self, visit: Callable[[Place, Any], None]):
        """Calls visit(place, blocks copied before) for each tile of this program, and counts its blocks."""
        programs, mine = lax.axis_size("cluster"), lax.axis_index("cluster")

        def turn(t, before):
            place = self.place(mine + t * programs)
            visit(place, before)
            return before + place.steps

        turns = lax.div(self.number - mine + programs - 1, programs)
        return lax.fori_loop(0, turns, turn, jnp.int32(0))


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


def _aligned(scales: Float32[Array, "KB M"]) -> Float32[Array, "KB M4"]:
    """Rows of whole 16 bytes, which TMA needs."""
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % 4)))


def _whole_lines(values: Float[Array, "*g R K"]) -> Float[Array, "*g R KP"]:
    """Columns of whole swizzled lines, as jax 0.11 wants them: a copy, where K is no multiple of 128."""
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % K)])


def piece(columns: int) -> int:
    """The widest run of a tile's columns that no edge of a 128 x 128 scale crosses, wherever it lies."""
    return math.gcd(columns, K)


def _by_piece(scales: Float32[Array, "*g NB KB"], n: int, columns: int) -> Float32[Array, "*g KB L"]:
    """The scales that each tile of columns needs, one line of shared memory for each tile."""
    starts = jnp.arange(0, columns, piece(columns))[None] + jnp.arange(0, n, columns)[:, None]
    blocks = jnp.minimum(starts // K, scales.shape[-2] - 1)  # pieces past the last column are never stored
    lines = jnp.swapaxes(scales, -1, -2)[..., blocks]
    lines = jnp.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, LINE - blocks.shape[1])])
    return lines.reshape(*lines.shape[:-2], -1)
