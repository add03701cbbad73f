"""Work items of a grouped product: which tile of rows meets which group, from sizes that are data.

Tiles lie on a fixed grid of rows, so that a tile may hold rows of several groups and is then an item of each.
Items are in order of rows: those of one tile follow each other, and so do those of one group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul import reference


class Items(NamedTuple):
    """As many as `number` says; the rest repeat the last."""

    groups: Int[Array, " W"]
    tiles: Int[Array, " W"]
    starts: Int[Array, " G"]  # first row of each group
    ends: Int[Array, " G"]  # the row after its last
    number: Int[Array, ""]  # at least one, which may have no row


def of_rows(sizes: Int[Array, " G"], alignment: int, rows: int, tile: int) -> Items:
    """Items for results that have rows: groups without rows have none."""
    return _items(sizes, alignment, rows, tile, least=0)


def of_groups(sizes: Int[Array, " G"], alignment: int, rows: int, tile: int) -> Items:
    """Items for results that sum over rows: each group has one at least, so that its sum is written."""
    return _items(sizes, alignment, rows, tile, least=1)


def _items(sizes, alignment: int, rows: int, tile: int, least: int) -> Items:
    groups, tiles = sizes.shape[0], -(-rows // tile)
    starts = reference.starts(sizes, alignment)
    ends = starts + sizes
    first = jnp.minimum(starts // tile, tiles - 1)
    touched = jnp.where(sizes > 0, (ends - 1) // tile - first + 1, least)
    last = jnp.cumsum(touched)
    count = jnp.maximum(last[-1], 1)
    # Each group but the first may share its first tile; one without rows has an item at most.
    item = jnp.minimum(jnp.arange(tiles + groups), count - 1)
    group = jnp.minimum(jnp.searchsorted(last, item, side="right"), groups - 1)
    place = first[group] + item - (last - touched)[group]
    as_scalars = [jax.lax.convert_element_type(a, jnp.int32) for a in (group, place, starts, ends, count)]
    return Items(*as_scalars)
