"""Definition of the exchange of blocks between the n devices of a mesh axis, whole or in part."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


class Rows(NamedTuple):
    """How many rows of each block are sent, the first ones, and how many come from each device.

    `received` is `sent` exchanged: a device that expects other rows than a peer sends waits forever.
    """

    sent: Int32[Array, " n"]
    received: Int32[Array, " n"]

    def back(self) -> "Rows":
        """Of the exchange that returns what this one brought."""
        return Rows(self.received, self.sent)


def exchange(x: Shaped[Array, "n T D"], rows: Rows | None, axis: str) -> Shaped[Array, "n T D"]:
    """Block i of device j becomes block j of device i; rows that are not sent arrive as zeros."""
    return jax.lax.all_to_all(
        x if rows is None else first(x, rows.sent), axis, split_axis=0, concat_axis=0, tiled=True
    )


def first(x: Shaped[Array, "n T D"], counts: Int32[Array, " n"]) -> Shaped[Array, "n T D"]:
    """The first rows of each block; zeros in place of the rest."""
    there = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    return jnp.where(there[:, :, None], x, jnp.zeros((), x.dtype))
