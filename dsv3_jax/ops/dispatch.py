"""Moves tokens to the devices that hold their experts and back, dropping none.

Inside the step every device holds T tokens and E / n of the experts, n being the size of the expert axis. A
token travels once to each device that holds one of its experts and is expanded there to one row an expert; on
the way back the rows of a token are summed before they travel (arXiv:2412.19437, section 3.2.2). The gate
weight multiplies on the experts' side, before the down projection, so that `combine` is a plain sum.

Shapes are fixed, so there is room for as many rows a pair of devices as is asked for. Rows beyond it go in
further rounds: a load that is not balanced takes longer and gives the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import mesh
from dsv3_jax.mesh import EXPERT
from pallas_kernels import all_to_all
from pallas_kernels.all_to_all import Rows

_CHUNK = 4096  # rows that are added at a time


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


class Way(NamedTuple):
    """Where tokens were put to be sent, and what arrived to be expanded."""

    out: Plan
    there: Plan


@runtime_checkable
class Dispatcher(Protocol):
    """A transport: `combine` undoes `dispatch`, and each is the other's transpose."""

    def rounds(self, route: Route, experts: int) -> Int[Array, "T K"] | None:
        """In which round each choice of a token is sent; None where one is enough for any load."""
        ...

    def dispatch(self, x: Float[Array, "T D"], route: Route, experts: int) -> tuple[Arrived, Way]:
        """Brings to each device the rows of its experts, of one round; ids past the last are of no expert."""
        ...

    def combine(self, y: Float[Array, "rows D"], way: Way) -> Float[Array, "T D"]:
        """Brings the sum of each token's rows back to the token."""
        ...


Exchange = Callable[[Float[Array, "n T D"], Rows], Float[Array, "n T D"]]


def scheduled(x: Float[Array, "n T D"], rows: Rows) -> Float[Array, "n T D"]:
    """XLA's all-to-all, which sends unused room too, and which XLA places beside other work."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=0, concat_axis=0, tiled=True)


def direct(x: Float[Array, "n T D"], rows: Rows) -> Float[Array, "n T D"]:
    """On TPU writes only the rows that there are into the receiver's memory, and waits for them."""
    return all_to_all.exchange(x, EXPERT, rows)


@dataclass(frozen=True)
class AllToAll:
    """Exchange of as many rows as there is room for between each pair of devices."""

    alignment: int = 1
    room: float | None = None  # in rows of a balanced load; None for that of any load
    exchange: Exchange = scheduled

    def rounds(self, route: Route, experts: int) -> Int[Array, "T K"] | None:
        """A round's rows of a pair of devices are no more than there is room for, and end with a token."""
        tokens, k = route.experts.shape
        local = experts // jax.lax.axis_size(EXPERT)
        room = self._room(tokens, k, experts)
        if room >= tokens * min(k, local):
            return None
        chosen = _by_device(route, experts)
        before = jnp.cumsum(chosen, axis=0) - chosen
        return jnp.take_along_axis(before // room, route.experts // local, axis=1)

    def dispatch(self, x: Float[Array, "T D"], route: Route, experts: int) -> tuple[Arrived, Way]:
        """Packs tokens by device, sends them, and sorts what arrives by expert."""
        devices, (tokens, k) = jax.lax.axis_size(EXPERT), route.experts.shape
        local = experts // devices
        room = self._room(tokens, k, experts)
        out, sent = _packing(route, experts, min(room, tokens))
        rows = Rows(sent, _swap(sent))
        arrived = self.exchange(expand(x, out).reshape(devices, -1, x.shape[1]), rows)

        # What is not sent is of expert -1, and of no weight.
        ids = expand(route.experts + 1, out).reshape(devices, -1, k)
        weights = expand(route.weights, out).reshape(devices, -1, k)
        mine = _swap(ids).reshape(-1, k) - 1 - jax.lax.axis_index(EXPERT) * local
        each = min(k, local)
        most = min(len(mine) * each, devices * (room + each - 1))
        there, sizes = _plan(mine, local, self.alignment, most)
        row_weights = expand(_swap(weights).reshape(-1, 1), _of_pairs(there))[:, 0]
        return Arrived(expand(arrived.reshape(len(mine), -1), there), row_weights, sizes), Way(out, there)

    def combine(self, y: Float[Array, "rows D"], way: Way) -> Float[Array, "T D"]:
        """Sums the rows of each token on the experts' device, sends the sums home and adds them up there."""
        devices = jax.lax.axis_size(EXPERT)
        sums = reduce(y, way.there).reshape(devices, -1, y.shape[1])
        sent = jnp.sum((way.out.pair < way.out.row.size).reshape(devices, -1), axis=1, dtype=jnp.int32)
        home = self.exchange(sums, Rows(_swap(sent), sent))
        return reduce(home.reshape(-1, y.shape[1]), way.out)

    def _room(self, tokens: int, k: int, experts: int) -> int:
        """Rows of a pair of devices in a round, before the last token's further ones."""
        devices = jax.lax.axis_size(EXPERT)
        if self.room is None:
            return tokens * min(k, experts // devices)
        return -(-math.ceil(self.room * tokens * k / devices) // 128) * 128


def in_rounds(
    once: Callable[[Any, Array, Route], Array],
    dispatcher: Dispatcher,
    weights: Any,
    x: Float[Array, "T D"],
    route: Route,
    experts: int,
) -> Float[Array, "T D"]:
    """The sum of `once(weights, x, route)` over parts of a route that each fit a round.

    The first round is run, and differentiated, as if it were alone. Others turn up only where a load is far
    from balanced: they are run again for their gradients, and nothing of them is kept.
    """
    rounds = dispatcher.rounds(route, experts)
    if rounds is None:
        return once(weights, x, route)
    rounds, count = mesh.vary((rounds, jax.lax.pmax(jnp.max(rounds), EXPERT) + 1))
    y = once(weights, x, _of_round(route, rounds, 0, experts))
    leaves, tree = jax.tree.flatten(weights)
    quantised = [w.dtype.itemsize == 1 for w in leaves]  # has no gradient, and is not to be summed
    moving, fixed = ([w for w, q in zip(leaves, quantised, strict=True) if q == want] for want in (0, 1))

    def again(moving, x, gates, fixed, chosen, rounds, turn):
        some, others = iter(moving), iter(fixed)
        whole = [next(others if q else some) for q in quantised]
        part = _of_round(Route(chosen, gates), rounds, turn, experts)
        return once(jax.tree.unflatten(tree, whole), x, part)

    further: Array = _further(again, moving, x, route.weights, (fixed, route.experts, rounds), count)
    return y + further


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(again: Callable, weights: list, x: Array, gates: Array, constant: tuple, count: Array) -> Array:
    """The sum of rounds from the second on."""
    turn = lambda n, y: y + again(weights, x, gates, *constant, n)  # noqa: E731
    with jax.named_scope("further_rounds"):
        return jax.lax.fori_loop(1, count, turn, mesh.vary(jnp.zeros_like(x)))


def _further_backward(again: Callable, kept: tuple, g: Array):
    weights, x, gates, constant, count = kept

    # Two loops, so that gradients of weights can wait while those of inputs go on.
    def inputs(n, sums):
        _, pull = jax.vjp(lambda x, gates: again(weights, x, gates, *constant, n), x, gates)
        return jax.tree.map(jnp.add, sums, pull(g))

    def of_weights(n, sums):
        _, pull = jax.vjp(lambda weights: again(weights, x, gates, *constant, n), weights)
        return jax.tree.map(jnp.add, sums, pull(g)[0])

    zeros = lambda tree: mesh.vary(jax.tree.map(jnp.zeros_like, tree))  # noqa: E731
    with jax.named_scope("further_rounds"):
        dx, dgates = jax.lax.fori_loop(1, count, inputs, zeros((x, gates)))
        dw = jax.lax.fori_loop(1, count, of_weights, zeros(weights))
    return dw, dx, dgates, None, None


_further.defvjp(lambda again, *kept: (_further(again, *kept), kept), _further_backward)


def _of_round(route: Route, rounds: Int[Array, "T K"], number, experts: int) -> Route:
    """Only the choices of one round."""
    return route._replace(experts=jnp.where(rounds == number, route.experts, experts))


def _by_device(route: Route, experts: int) -> Int[Array, "T n"]:
    """How many experts of each device a token chose."""
    devices = jax.lax.axis_size(EXPERT)
    chosen = route.experts[:, :, None] // (experts // devices) == jnp.arange(devices)[None, None]
    return jnp.sum(chosen, axis=1, dtype=jnp.int32)


def _packing(route: Route, experts: int, room: int) -> tuple[Plan, Int[Array, " n"]]:
    """Where each token goes among what is sent, [n, room], once a device; and how many go to each."""
    devices, k = jax.lax.axis_size(EXPERT), route.experts.shape[1]
    wanted = jnp.minimum(_by_device(route, experts), 1)
    device = route.experts // (experts // devices)
    earlier = (device[:, :, None] == device[:, None, :]) & jnp.tri(k, k=-1, dtype=bool)[None]
    here = (device < devices) & ~jnp.any(earlier, axis=2)
    place = jnp.take_along_axis(jnp.cumsum(wanted, axis=0) - wanted, device, axis=1, mode="clip")
    row = jnp.where(here, device * room + place, devices * room).astype(jnp.int32)
    return Plan(_pairs(row, devices * room), row, here), jnp.sum(wanted, axis=0)


def _swap(x: Array) -> Array:
    """Block i of device j becomes block j of device i."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=0, concat_axis=0, tiled=True)


def _plan(
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
