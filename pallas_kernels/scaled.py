"""FP8 values with one FP32 scale for each tile of them (arXiv:2412.19437, section 3.3.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of E4M3
# An amax below this counts as this, so that a tile of zeros has a scale that one can divide by. DeepGEMM's
# 1e-4 would round the gradients of a mean over many tokens, which are near 1e-8, to zero.
LEAST_AMAX = 2.0**-100

Scale = Callable[[Float32[Array, "*s"]], Float32[Array, "*s"]]


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["tile"])
@dataclass(frozen=True)
class Scaled:
    """`values[r, c] * scales[r // tile[0], c // tile[1]]`; the last tiles may be partial."""

    values: Float[Array, "*g R C"]
    scales: Float32[Array, "*g RT CT"]
    tile: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    @property
    def mT(self) -> "Scaled":  # noqa: N802 - as arrays call it
        """Rows and columns exchanged."""
        return Scaled(self.values.mT, self.scales.mT, (self.tile[1], self.tile[0]))


def exact(amax: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The scale that takes the largest magnitude of a tile to 448: amax / 448.

    Written as a product with the FP32 number nearest to 1 / 448, which rounds once and so gives the same bits
    on every platform: XLA makes such a product of a division by a constant, numpy and kernels do not.
    """
    return jnp.maximum(amax, LEAST_AMAX) * jnp.float32(1 / LARGEST)


def power_of_two(amax: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The least power of two that is not below the exact scale (UE8M0); from bits, so without rounding."""
    scale = exact(amax)
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    rounded = jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & ~0x7FFFFF, jnp.float32)
    return jnp.where(scale < jnp.inf, rounded, scale)  # Mosaic GPU has no isfinite


def tiles(size: int, tile: int) -> int:
    """How many tiles cover so many rows or columns."""
    return -(-size // tile)


def amax(x: Float32[Array, "*g R C"], tile: tuple[int, int]) -> Float32[Array, "*g RT CT"]:
    """The largest magnitude in each tile."""
    x = jnp.abs(x)
    for axis, size in zip((x.ndim - 2, x.ndim - 1), tile, strict=True):
        x = _by_tile(x, axis, size).max(axis + 1)
    return x


def _by_tile(x: Array, axis: int, size: int) -> Array:
    """An axis as tiles and what is in each, zeros where the last is partial.

    One axis at a time: JAX refuses to reshape two beside one that is split over devices.
    """
    count = tiles(x.shape[axis], size)
    padding = [(0, count * size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, padding).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])


def spread(scales: Float32[Array, "*g RT CT"], tile: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """One scale for each value instead of one for each tile."""
    rows, columns = shape[-2:]
    for axis, (t, size) in zip((-2, -1), zip(tile, (rows, columns), strict=True), strict=True):
        if t > 1:
            scales = jax.lax.slice_in_dim(jnp.repeat(scales, t, axis), 0, size, axis=axis)
    return scales


def dequantize(x: Scaled) -> Float32[Array, "*g R C"]:
    """The numbers that stand for, in FP32."""
    return x.values.astype(jnp.float32) * spread(x.scales, x.tile, x.shape)
