"""The scaled product of two matrices on Hopper; how its tiles are computed is in `hopper_products`."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import hopper, hopper_products
from pallas_kernels.fp8_matmul import tuning
from pallas_kernels.hopper_products import K, Operands
from pallas_kernels.hopper_tiles import TILE_ROWS, Place, Tiles, W, Walk
from pallas_kernels.scaled import Scaled


def serves(x: Scaled, w: Scaled, dtype) -> bool:
    """Whether tiles are those of the report and rows of the result whole 16 bytes, which TMA needs."""
    aligned = w.shape[0] * jnp.dtype(dtype).itemsize % 16 == 0
    return aligned and x.tile[1] == K and w.tile[0] in (1, K)


@partial(jax.jit, static_argnames=("dtype", "tiles", "interpret", "sms"))
def matmul(
    x: Scaled,
    w: Scaled,
    into: Float32[Array, "M N"] | None = None,
    dtype=jnp.bfloat16,
    *,
    tiles: Tiles | None = None,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float[Array, "M N"]:
    """The definition's product, of operands that are served."""
    (m, k), n = x.shape, w.shape[0]
    tiles = tiles or tuning.hopper(m, n, k, w.tile[0], dtype)
    grid = pl.cdiv(m, TILE_ROWS * tiles.sharing), pl.cdiv(n, tiles.columns)
    steps = pl.cdiv(pl.cdiv(k, K), tiles.flight) * tiles.flight

    def place(index) -> Place:
        i, j = plgpu.planar_snake(index, grid, 1, tuning.SNAKE)
        return Place(i * tiles.sharing + lax.axis_index("peer"), j, 0, steps)

    walk = Walk(grid[0] * grid[1], place, shared=W)
    if w.tile[0] == 1:
        operands, scaling = Operands.by_column(x, w), hopper_products.by_column
    else:
        operands, scaling = Operands.by_block(x, w, tiles), hopper_products.by_pieces
    out = (m, n), dtype
    return hopper_products.run(lambda: walk, operands, [], into, out, tiles, scaling, interpret, sms)
