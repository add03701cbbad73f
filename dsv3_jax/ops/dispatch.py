"""Moves tokens to the devices that hold their experts and back, dropping none.

Inside the step every device holds T tokens and E / n of the experts, n being the size of the expert axis. A
token travels once to each device that holds one of its experts and is expanded there to one row an expert; on
the way back the rows of a token are summed before they travel (arXiv:2412.19437, section 3.2.2). The gate
weight multiplies on the experts' side, before the down projection, so that `combine` is a plain sum.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.mesh import EXPERT


class Route(NamedTuple):
    """Which experts a token goes to, and with what weight."""

    experts: Int[Array, "T K"]
    weights: Float[Array, "T K"]


class Plan(NamedTuple):
    """Where each (token, choice) pair of the tokens present on a device sits among its rows.

    `row` counts a device's rows after sorting by expert; pairs of experts held elsewhere are not `here`. Rows
    of no pair have the number of pairs in place of one's index.
    """

    pair: Int[Array, " rows"]
    row: Int[Array, "tokens K"]
    here: Bool[Array, "tokens K"]


class Arrived(NamedTuple):
    """Rows sorted by local expert, each expert's from a multiple of the alignment on; all others are zero."""

    rows: Float[Array, "rows D"]
    weights: Float[Array, " rows"]
    sizes: Int[Array, " local"]


@runtime_checkable
class Dispatcher(Protocol):
    """A transport: `combine` undoes `dispatch`, and each is the other's transpose."""

    def dispatch(self, x: Float[Array, "T D"], route: Route, experts: int) -> tuple[Arrived, Plan]:
        """Brings to each device the rows of its experts."""
        ...

    def combine(self, y: Float[Array, "rows D"], plan: Plan) -> Float[Array, "T D"]:
        """Brings the sum of each token's rows back to the token."""
        ...


@dataclass(frozen=True)
class AllToAll:
    """Fixed-size exchange: each pair of devices reserves room for T tokens, so that any load fits.

    The bound is that of the worst case, every token going to every device: n * T tokens received and
    n * T * min(K, E / n) rows, each expert's rounded up to a multiple of `alignment`.
    """

    alignment: int = 1

    def dispatch(self, x: Float[Array, "T D"], route: Route, experts: int) -> tuple[Arrived, Plan]:
        """Sends each token where its experts are and sorts what arrives by expert."""
        devices = jax.lax.axis_size(EXPERT)
        local = experts // devices
        target = jnp.arange(devices, dtype=jnp.int32)
        wanted = jnp.any(route.experts[None] // local == target[:, None, None], axis=-1)
        sent = jnp.where(wanted[:, :, None], x[None], jnp.zeros((), x.dtype))
        tokens = _exchange(sent).reshape(-1, x.shape[-1])
        chosen = jax.lax.all_gather(route.experts, EXPERT, axis=0, tiled=True)
        weights = jax.lax.all_gather(route.weights, EXPERT, axis=0, tiled=True)
        plan, sizes = _plan(chosen - jax.lax.axis_index(EXPERT) * local, local, self.alignment)
        rows = expand(tokens, plan)
        return Arrived(rows, expand(weights.reshape(-1, 1), _of_pairs(plan))[:, 0], sizes), plan

    def combine(self, y: Float[Array, "rows D"], plan: Plan) -> Float[Array, "T D"]:
        """Sums the rows of each token on the experts' device, sends the sums home and adds them up there."""
        devices = jax.lax.axis_size(EXPERT)
        sums = reduce(y, plan)
        return jnp.sum(_exchange(sums.reshape(devices, -1, y.shape[-1])), axis=0)


def _exchange(x: Float[Array, "n T D"]) -> Float[Array, "n T D"]:
    """Block i of device j becomes block j of device i; its own inverse and transpose."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=0, concat_axis=0, tiled=True)


def _plan(expert: Int[Array, "tokens K"], local: int, alignment: int) -> tuple[Plan, Int[Array, " local"]]:
    """Sorts the pairs by local expert; ties keep the order of the tokens. Pairs of others get no row."""
    here = (expert >= 0) & (expert < local)
    key = jnp.where(here, expert, local).reshape(-1)
    order = jnp.argsort(key, stable=True)
    place = jnp.argsort(order, stable=True)  # among all pairs, sorted without gaps; the inverse permutation
    sizes = jnp.sum(key[:, None] == jnp.arange(local, dtype=key.dtype)[None], axis=0, dtype=jnp.int32)
    padding = -sizes % alignment
    gaps = jnp.concatenate([jnp.zeros_like(sizes[:1]), jnp.cumsum(padding)])  # before each expert
    most = expert.shape[0] * min(expert.shape[1], local) + local * (alignment - 1)
    row = jnp.where(key < local, place.astype(jnp.int32) + gaps[key], most)
    pair = jnp.full(most, key.size, jnp.int32).at[row].set(jnp.arange(key.size, dtype=jnp.int32), mode="drop")
    return Plan(pair, row.reshape(expert.shape), here), sizes


def _of_pairs(plan: Plan) -> Plan:
    """The same plan for values that exist once a pair instead of once a token."""
    return Plan(plan.pair, plan.row.reshape(-1, 1), plan.here.reshape(-1, 1))


@jax.custom_vjp
def expand(tokens: Float[Array, "tokens D"], plan: Plan) -> Float[Array, "rows D"]:
    """One row for each pair of a token and a local expert, sorted by expert. The transpose of `reduce`."""
    rows = tokens.at[plan.pair // plan.row.shape[1]].get(mode="clip")
    return jnp.where((plan.pair < plan.row.size)[:, None], rows, jnp.zeros((), tokens.dtype))


@jax.custom_vjp
def reduce(rows: Float[Array, "rows D"], plan: Plan) -> Float[Array, "tokens D"]:
    """The sum of the rows of each token. A gather, as `expand` is, where the derived rule would scatter."""
    picked = rows.at[plan.row].get(mode="clip")
    return jnp.sum(jnp.where(plan.here[:, :, None], picked, jnp.zeros((), rows.dtype)), axis=1)


def _expand_backward(plan: Plan, g):
    return reduce(g, plan), None


def _reduce_backward(plan: Plan, g):
    return expand(g, plan), None


expand.defvjp(lambda tokens, plan: (expand(tokens, plan), plan), _expand_backward)
reduce.defvjp(lambda rows, plan: (reduce(rows, plan), plan), _reduce_backward)
