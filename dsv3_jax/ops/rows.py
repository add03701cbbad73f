"""Rows that tokens are copied to and summed from: gathers both ways, each the other's transpose."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_CHUNK = 4096  # rows that are added at a time


class Plan(NamedTuple):
    """Where each (token, choice) pair of the tokens present on a device sits among rows, if it is `here`.

    Rows of no pair have the number of pairs in place of one's index.
    """

    pair: Int[Array, " rows"]
    row: Int[Array, "tokens K"]
    here: Bool[Array, "tokens K"]


def packed(device: Int[Array, "tokens K"], devices: int, room: int) -> tuple[Plan, Int[Array, " n"]]:
    """Each token once for each device that is named, in blocks [n, room]; and how many go to each.

    Numbers outside of 0 to n - 1 are of no device.
    """
    wanted = jnp.minimum(counted(device, devices), 1)
    earlier = (device[:, :, None] == device[:, None, :]) & jnp.tri(device.shape[1], k=-1, dtype=bool)[None]
    here = (device >= 0) & (device < devices) & ~jnp.any(earlier, axis=2)
    place = jnp.take_along_axis(jnp.cumsum(wanted, axis=0) - wanted, device, axis=1, mode="clip")
    row = jnp.where(here, device * room + place, devices * room).astype(jnp.int32)
    return Plan(_pairs(row, devices * room), row, here), jnp.sum(wanted, axis=0)


def counted(device: Int[Array, "tokens K"], devices: int) -> Int[Array, "tokens n"]:
    """How often each token names a device."""
    return jnp.sum(device[:, :, None] == jnp.arange(devices)[None, None], axis=1, dtype=jnp.int32)


def by_expert(
    expert: Int[Array, "tokens K"], local: int, alignment: int, most: int
) -> tuple[Plan, Int[Array, " local"]]:
    """Sorts at most `most` pairs by local expert; ties keep the order of the tokens. Others get no row."""
    here = (expert >= 0) & (expert < local)
    chosen = (expert.reshape(-1, 1) == jnp.arange(local)[None]).astype(jnp.int32)
    sizes = jnp.sum(chosen, axis=0)
    room = sizes + -sizes % alignment
    rows = (jnp.cumsum(room) - room)[None] + jnp.cumsum(chosen, axis=0) - chosen
    most += local * (alignment - 1)
    row = jnp.where(here, jnp.sum(chosen * rows, axis=1).reshape(expert.shape), most)
    return Plan(_pairs(row, most), row, here), sizes


def _pairs(row: Int[Array, "tokens K"], rows: int) -> Int[Array, " rows"]:
    """The pair of each row; the number of pairs where there is none."""
    pairs = jnp.arange(row.size, dtype=jnp.int32)
    return jnp.full(rows, row.size, jnp.int32).at[row.reshape(-1)].set(pairs, mode="drop")


def of_pairs(plan: Plan) -> Plan:
    """The same plan for values that exist once a pair instead of once a token."""
    return Plan(plan.pair, plan.row.reshape(-1, 1), plan.here.reshape(-1, 1))


@jax.custom_vjp
def expand(tokens: Float[Array, "tokens D"], plan: Plan) -> Float[Array, "rows D"]:
    """One row for each pair of a token and a local expert, sorted by expert. The transpose of `reduce`."""
    rows = tokens.at[plan.pair // plan.row.shape[1]].get(mode="clip")
    return jnp.where((plan.pair < plan.row.size)[:, None], rows, jnp.zeros((), tokens.dtype))


@jax.custom_vjp
def reduce(rows: Float[Array, "rows D"], plan: Plan) -> Float[Array, "tokens D"]:
    """The sum of the rows of each token. A gather, as `expand` is, where the derived rule would scatter.

    Where most tokens have one row, or none, first ones are gathered and what is left is added by chunks.
    """
    if plan.row.size <= 2 * rows.shape[0]:
        return _picked(rows, plan.row, plan.here, axis=1)
    first = plan.here & (jnp.cumsum(plan.here, axis=1) == 1)
    sums = _picked(rows, jnp.min(jnp.where(first, plan.row, rows.shape[0]), axis=1), jnp.any(first, axis=1))
    left = (plan.here & ~first).reshape(-1)
    place = jnp.where(left, jnp.cumsum(left) - 1, left.size)
    pairs = jnp.full(left.size + _CHUNK, left.size, jnp.int32)
    pairs = pairs.at[place].set(jnp.arange(left.size, dtype=jnp.int32), mode="drop")

    def add(n, sums):
        pair = jax.lax.dynamic_slice_in_dim(pairs, n * _CHUNK, _CHUNK)
        row = plan.row.reshape(-1).at[pair].get(mode="clip")
        more = _picked(rows, row, pair < left.size)
        return sums.at[pair // plan.row.shape[1]].add(more, mode="drop")

    with jax.named_scope("further_rows"):
        return jax.lax.fori_loop(0, -(-jnp.sum(left) // _CHUNK), add, sums)


def _picked(rows: Float[Array, "rows D"], row: Array, there: Array, axis: tuple[int, ...] | int = ()):
    """The rows of these numbers, where they are there, summed over an axis."""
    picked = rows.at[row].get(mode="clip")
    return jnp.sum(jnp.where(there[..., None], picked, jnp.zeros((), rows.dtype)), axis=axis)


def _expand_backward(plan: Plan, g):
    return reduce(g, plan), None


def _reduce_backward(plan: Plan, g):
    return expand(g, plan), None


expand.defvjp(lambda tokens, plan: (expand(tokens, plan), plan), _expand_backward)
reduce.defvjp(lambda rows, plan: (reduce(rows, plan), plan), _reduce_backward)
