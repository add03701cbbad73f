"""FP8 training as the report's ablations do worse than it: coarser gradients, and sums of few bits.

Definitions in plain `jnp`, for `tools.precision_study`; no kernel has these on purpose.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from dsv3_jax import ops
from dsv3_jax.ops import Ops, recompute
from dsv3_jax.ops.fp8 import DENSE, EXPERTS
from dsv3_jax.ops.plain import ALIGNMENT
from pallas_kernels import quantize
from pallas_kernels.grouped_matmul.reference import padded
from pallas_kernels.scaled import Scale, Scaled, spread
from pallas_kernels.support import vary_like

_TILE = 128
_STEP = 32  # products that a Hopper tensor core aligns to the largest of them and adds at once
_DROPPED = 10  # of FP32's 24 bits: 14 stay (arXiv:2412.19437, section 3.3.2)


def block_gradients(remat: recompute.Remat = recompute.nothing) -> Ops:
    """Gradients of outputs in 128 x 128 blocks, as weights are (arXiv:2412.19437, appendix B.2)."""
    return ops.fp8(remat, *(products._replace(gradient=in_blocks) for products in (DENSE, EXPERTS)))


def reduced_sums(remat: recompute.Remat = recompute.nothing) -> Ops:
    """Sums that stay in a tensor core to their end, 14 bits wide, where the report moves them to FP32."""
    dense = DENSE._replace(multiply=matmul, weight_gradient=partial(matmul, dtype=jnp.float32))
    experts = EXPERTS._replace(multiply=grouped_matmul, weight_gradient=grouped_weight_gradient)
    return ops.fp8(remat, dense, experts)


def in_blocks(g: Float[Array, "T O"], scale: Scale) -> tuple[Scaled, Scaled]:
    """One quantisation for both axes; as rows of 128, so that every product takes them."""
    blocks = quantize.quantize(g, (_TILE, _TILE), scale)
    return _as_rows(blocks), _as_rows(blocks.mT)


def matmul(x: Scaled, w: Scaled, dtype=jnp.bfloat16) -> Float[Array, "M N"]:
    """x [M, K] times w [N, K] transposed."""
    start = jnp.zeros((x.shape[0], w.shape[0]), jnp.float32)
    return _add_product(start, x, w).astype(dtype)


def grouped_matmul(x: Scaled, w: Scaled, sizes: Int[Array, " G"]) -> Float[Array, "M N"]:
    """Rows sorted by group, x [M, K], times the transposed matrix of their group, w [G, N, K]."""

    def one(tile):
        rows, group = tile
        return matmul(rows, jax.tree.map(lambda a: a[group], w))

    tiles = jax.tree.map(lambda a: _whole_tiles(a).reshape(-1, ALIGNMENT, a.shape[1]), x)
    return jax.lax.map(one, (tiles, _groups(sizes, len(tiles.values)))).reshape(-1, w.shape[1])[: x.shape[0]]


def grouped_weight_gradient(x: Scaled, y: Scaled, sizes: Int[Array, " G"]) -> Float32[Array, "G I O"]:
    """x [I, M] times y [O, M] transposed over the columns of each group."""

    def one(sums, tile):
        x, y, group = tile
        return sums.at[group].set(_add_product(sums[group], x, y)), None

    x_tiles, y_tiles = (
        Scaled(_whole_tiles(a.values.T).reshape(-1, ALIGNMENT, a.shape[0]).mT, a.scales.T[..., None], a.tile)
        for a in (x, y)
    )
    groups = _groups(sizes, len(x_tiles.values))
    real = jnp.arange(len(groups)) < jnp.sum(padded(sizes, ALIGNMENT)) // ALIGNMENT
    # Tiles past the last group are of none: they add to sums that nobody reads.
    groups = jnp.where(real, groups, sizes.size)
    start = jnp.zeros((sizes.size + 1, x.shape[0], y.shape[0]), jnp.float32)
    return jax.lax.scan(one, vary_like(start, x, y, sizes), (x_tiles, y_tiles, groups))[0][:-1]


def _add_product(sums: Float32[Array, "M N"], x: Scaled, w: Scaled) -> Float32[Array, "M N"]:
    """Adds 32 products at a time and cuts the sum off, towards zero, after each."""

    def one(sums, step):
        x, w, x_scale, w_scale = step
        product = jnp.matmul(x, w.T, precision="highest") * (x_scale[:, None] * w_scale[None])
        return _cut(sums + product), None

    steps = jax.tree.map(_in_steps, (x.values.astype(jnp.float32), w.values.astype(jnp.float32)))
    scales = (jnp.repeat(_by_row(a).T, _TILE // _STEP, axis=0)[: len(steps[0])] for a in (x, w))
    return jax.lax.scan(one, vary_like(sums, x, w), (*steps, *scales))[0]


def _in_steps(values: Float32[Array, "R K"]) -> Float32[Array, "S R 32"]:
    padding = -values.shape[1] % _STEP
    return jnp.pad(values, ((0, 0), (0, padding))).reshape(len(values), -1, _STEP).swapaxes(0, 1)


def _cut(sums: Float32[Array, "M N"]) -> Float32[Array, "M N"]:
    bits = jax.lax.bitcast_convert_type(sums, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & -(1 << _DROPPED), jnp.float32)


def _whole_tiles(rows: Array) -> Array:
    return jnp.pad(rows, ((0, -len(rows) % ALIGNMENT), (0, 0)))


def _by_row(x: Scaled) -> Float32[Array, "R T"]:
    return spread(x.scales, (x.tile[0], 1), (x.shape[0], x.scales.shape[1]))


def _as_rows(x: Scaled) -> Scaled:
    return Scaled(x.values, _by_row(x), (1, x.tile[1]))


def _groups(sizes: Int[Array, " G"], tiles: int) -> Int[Array, " T"]:
    """The group of each 128 rows; the last one's past its end."""
    ends = jnp.cumsum(padded(sizes, ALIGNMENT)) // ALIGNMENT
    found = jnp.searchsorted(ends, jnp.arange(tiles), side="right")
    return jnp.minimum(found, sizes.size - 1)
