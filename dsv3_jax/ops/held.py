"""How weights of linear layers are held in memory while text is written: as products read them, or in FP8."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.scaled import E4M3, Scaled, amax, dequantize, exact, power_of_two, spread

_BLOCK = 128

Hold = Callable[[Array, Array], Any]
"""A weight of a linear layer in the type of its products, and as it was: what takes its place."""


def as_it_is(w: Float[Array, "*g I O"], master: Float[Array, "*g I O"]) -> Float[Array, "*g I O"]:
    """Held as products read it."""
    return w


def in_fp8(w: Float[Array, "*g I O"], master: Float[Array, "*g I O"]) -> Scaled:
    """Held as E4M3 with an FP32 scale for each 128 x 128 block, a byte a weight, as released weights are.

    Of weights that came from such blocks every number is that of the blocks again. So is every scale if it is
    a power of two; others are within the rounding of the type that the checkpoint has.
    """
    wide, tile = master.astype(jnp.float32), (_BLOCK, _BLOCK)

    def scaled(scales: Array) -> Scaled:
        return Scaled((wide * spread(1 / scales, tile, w.shape)).astype(E4M3), scales, tile)

    largest = amax(wide, tile)
    scales = power_of_two(largest)
    lost = amax(dequantize(scaled(scales)) - wide, tile)
    return scaled(jnp.where(lost == 0, scales, exact(largest)))


def in_use(block, of_blocks: Callable[[Scaled], Any]):
    """A layer with weights that are held as blocks in the form that products read."""
    held = lambda w: isinstance(w, Scaled)  # noqa: E731
    return jax.tree.map(lambda w: of_blocks(w) if held(w) else w, block, is_leaf=held)


def widened(blocks: Scaled, dtype: jnp.dtype) -> Float[Array, "*g I O"]:
    """For products of that type."""
    return dequantize(blocks).astype(dtype)
