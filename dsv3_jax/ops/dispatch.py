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
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.mesh import EXPERT
from dsv3_jax.ops import rows
from dsv3_jax.ops.exchange import Exchange, Groups, cross, scheduled, swap
from dsv3_jax.ops.rows import Plan
from pallas_kernels.all_to_all import Rows


class Route(NamedTuple):
    """Which experts a token goes to, and with what weight."""

    experts: Int[Array, "T K"]
    weights: Float[Array, "T K"]


class Arrived(NamedTuple):
    """Rows sorted by local expert, each expert's from a multiple of the alignment on; all others are zero."""

    rows: Float[Array, "rows D"]
    weights: Float[Array, " rows"]
    sizes: Int[Array, " local"]


class Way(NamedTuple):
    """Where tokens were put to be sent, and what arrived to be expanded."""

    outs: list[Plan]  # of every hop
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


class Hop(NamedTuple):
    """An exchange within groups of devices, each of which keeps what is for its experts, or passes it on."""

    groups: Groups  # of the expert axis; None for all devices together
    devices: int  # of a group
    place: Int[Array, ""]  # of this device in its group
    experts: int  # for which a device of the group receives tokens
    room: int  # rows between two devices of a group


@dataclass(frozen=True)
class AllToAll:
    """Exchange of as many rows as there is room for between each pair of devices.

    Where the expert axis spans several hosts, a token crosses to each host once, to the device that has the
    sender's place there, and that one passes it on within the host (arXiv:2412.19437, section 3.2.2).
    """

    alignment: int = 1
    room: float | None = None  # in rows of a balanced load; None for that of any load
    out: Exchange = scheduled  # to the experts: tokens, and gradients of what comes home
    home: Exchange = scheduled  # and the reverse
    hosts: int = 1  # that the expert axis spans, whose devices are neighbours in it
    reached: int | None = None  # hosts that a token's experts lie on at most; None for all

    def rounds(self, route: Route, experts: int) -> Int[Array, "T K"] | None:
        """A round's rows of a pair of devices are no more than there is room for, and end with a token."""
        tokens, k = route.experts.shape
        hops = self._hops(tokens, k, experts)
        last = hops[-1]
        arrived = tokens if len(hops) == 1 else hops[0].devices * min(hops[0].room, tokens)
        if last.room >= arrived * min(k, last.experts) and all(hop.room >= tokens for hop in hops[:-1]):
            return None
        devices = jax.lax.axis_size(EXPERT)
        chosen = rows.counted(route.experts // last.experts, devices)
        before = jnp.cumsum(chosen, axis=0) - chosen
        if len(hops) == 1:
            return _taken(before // last.room, route.experts // last.experts)
        # What others send by way of the same device lies before or behind, in their order.
        across = hops[0]
        sums = swap(jnp.tile(jnp.sum(chosen, axis=0)[None], (across.devices, 1)), across.groups)
        earlier = jnp.arange(across.devices)[:, None] < across.place
        before += jnp.sum(jnp.where(earlier, sums, 0), axis=0, keepdims=True)
        inner = _taken(before // last.room, route.experts // last.experts)
        crossing = jnp.minimum(rows.counted(route.experts // across.experts, across.devices), 1)
        outer = (jnp.cumsum(crossing, axis=0) - crossing) // across.room
        outer = _taken(outer, route.experts // across.experts)
        return inner * (jax.lax.pmax(jnp.max(outer), EXPERT) + 1) + outer

    def dispatch(self, x: Float[Array, "T D"], route: Route, experts: int) -> tuple[Arrived, Way]:
        """Packs tokens by device, sends them, and sorts what arrives by expert."""
        tokens, k = route.experts.shape
        hops = self._hops(tokens, k, experts)
        (ids, weights), outs = route, []
        for hop in hops:
            room = min(hop.room, len(x))
            out, sent = rows.packed(ids // hop.experts, hop.devices, room)
            blocks = rows.expand(x, out).reshape(hop.devices, room, -1)
            counts = Rows(sent, swap(sent, hop.groups))
            x = cross(self.out, self.home, blocks, counts, hop.groups).reshape(hop.devices * room, -1)
            # Counted from the first expert here. What is not sent is before it, and of no weight.
            ids = swap(rows.expand(ids + 1, out), hop.groups) - 1 - hop.place * hop.experts
            weights = swap(rows.expand(weights, out), hop.groups)
            outs.append(out)
        local, each = hops[-1].experts, min(k, hops[-1].experts)
        most = min(len(x) * each, hops[-1].devices * (hops[-1].room + each - 1))
        there, sizes = rows.by_expert(ids, local, self.alignment, most)
        row_weights = rows.expand(weights.reshape(-1, 1), rows.of_pairs(there))[:, 0]
        return Arrived(rows.expand(x, there), row_weights, sizes), Way(outs, there)

    def combine(self, y: Float[Array, "rows D"], way: Way) -> Float[Array, "T D"]:
        """Sums the rows of each token on the experts' device, sends the sums home and adds them up there."""
        y = rows.reduce(y, way.there)
        for out, (groups, devices) in reversed(list(zip(way.outs, self._groups(), strict=True))):
            sent = jnp.sum((out.pair < out.row.size).reshape(devices, -1), axis=1, dtype=jnp.int32)
            counts = Rows(swap(sent, groups), sent)
            blocks = y.reshape(devices, -1, y.shape[1])
            y = rows.reduce(cross(self.home, self.out, blocks, counts, groups).reshape(y.shape), out)
        return y

    def _groups(self) -> list[tuple[Groups, int]]:
        """Those that tokens are exchanged in, one after another, and the devices of a group."""
        devices = jax.lax.axis_size(EXPERT)
        if self.hosts == 1:
            return [(None, devices)]
        near = devices // self.hosts
        across = tuple(tuple(range(place, devices, near)) for place in range(near))
        within = tuple(tuple(range(first, first + near)) for first in range(0, devices, near))
        return [(across, self.hosts), (within, near)]

    def _hops(self, tokens: int, k: int, experts: int) -> list[Hop]:
        """Room is that of rows after expansion on the last hop, and of tokens on one before."""
        devices, here = jax.lax.axis_size(EXPERT), jax.lax.axis_index(EXPERT)
        *first, (groups, near) = self._groups()
        local = experts // devices
        # Through a device go the tokens of as many devices as there are hosts.
        room = self._room(self.hosts * tokens * k / near, self.hosts * tokens * min(k, local))
        hops = [Hop(groups, near, here % near, local, room)]
        for across, hosts in first:
            most = min(k, hosts if self.reached is None else self.reached)
            room = self._room(tokens * most / hosts, tokens)
            hops = [Hop(across, hosts, here // near, experts // hosts, room), *hops]
        return hops

    def _room(self, balanced: float, most: int) -> int:
        """Rows of a pair of devices in a round, before the last token's further ones."""
        return most if self.room is None else -(-math.ceil(self.room * balanced) // 128) * 128


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


def _taken(of_devices: Int[Array, "T n"], device: Int[Array, "T K"]) -> Int[Array, "T K"]:
    return jnp.take_along_axis(of_devices, device, axis=1)
