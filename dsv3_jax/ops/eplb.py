"""Redundant experts: which experts get a second place, and on which device each place is.

The policies of https://github.com/deepseek-ai/EPLB. Loads are of any unit and may be predicted in any way,
such as a moving average of those that were counted.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Tree = TypeVar("Tree")


class Replicas(NamedTuple):
    """Places by device, as many on each, those of one device one after another."""

    expert: Int[np.ndarray, "L P"]  # which expert is at each place
    places: Int[np.ndarray, "L E C"]  # of each expert, ascending; -1 where it has fewer than others
    copies: Int[np.ndarray, "L E"]


def rebalance(load: Float[np.ndarray, "L E"], places: int, groups: int, nodes: int, devices: int) -> Replicas:
    """Spreads experts and copies of the busiest ones over devices.

    Where groups of experts split over nodes, a group and its copies stay on one node, so that tokens limited
    to few groups travel to few nodes (for prefill); otherwise any device may hold any (for decoding).

    Raises:
        ValueError: if sizes do not divide, or there are fewer places than experts.
    """
    experts = load.shape[1]
    _check(experts, places, groups, nodes, devices)
    if groups % nodes:
        groups = nodes = 1
    expert = np.stack([_layer(row, places, groups, nodes, devices) for row in np.asarray(load, np.float64)])
    copies = np.stack([np.bincount(row, minlength=experts) for row in expert])
    by_expert = np.full((*load.shape, copies.max()), -1)
    for layer, row in enumerate(expert):
        for e in range(experts):
            by_expert[layer, e, : copies[layer, e]] = np.flatnonzero(row == e)
    return Replicas(expert, by_expert, copies)


def replicate(stack: Tree, replicas: Replicas) -> Tree:
    """Weights of experts, [L, E, ...], at their places, [L, P, ...], split over devices as they were."""
    layer = jnp.arange(len(replicas.expert))[:, None]
    expert = jnp.asarray(replicas.expert)

    def place(w: Array) -> Array:
        return w.at[layer, expert].get(out_sharding=jax.typeof(w).sharding)

    return jax.tree.map(lambda w: place(jnp.asarray(w)), stack)


def spread(
    chosen: Int[Array, "T K"], places: Int[Array, "E C"], copies: Int[Array, " E"]
) -> Int[Array, "T K"]:
    """The places of the chosen experts of a layer; tokens take turns at the copies of an expert."""
    turn = jnp.arange(chosen.shape[0], dtype=jnp.int32)[:, None] % copies[chosen]
    return places[chosen, turn]


def _layer(load: np.ndarray, places: int, groups: int, nodes: int, devices: int) -> np.ndarray:
    members = np.arange(load.size).reshape(groups, -1)
    chosen = []
    for mine in _pack(load[members].sum(axis=1), nodes):
        experts = members[mine].reshape(-1)
        copied = _copy(load[experts], places // nodes)
        each = load[experts] / np.bincount(copied)
        chosen += [experts[copied[at]] for at in _pack(each[copied], devices // nodes)]
    return np.concatenate(chosen)


def _pack(weights: np.ndarray, packs: int) -> list[list[int]]:
    """Equally many items to each pack: the heaviest that is left to the lightest pack with room."""
    if len(weights) == packs:
        return [[item] for item in range(packs)]
    content: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs)
    for item in np.argsort(-weights, kind="stable"):
        room = [pack for pack in range(packs) if len(content[pack]) < len(weights) // packs]
        lightest = min(room, key=lambda pack: total[pack])
        content[lightest].append(int(item))
        total[lightest] += weights[item]
    return content


def _copy(load: np.ndarray, places: int) -> np.ndarray:
    """Every expert once, then, one at a time, a copy of the expert whose copies are the busiest."""
    experts, copies = list(range(load.size)), np.ones(load.size)
    while len(experts) < places:
        busiest = int(np.argmax(load / copies))
        experts.append(busiest)
        copies[busiest] += 1
    return np.array(experts)


def _check(experts: int, places: int, groups: int, nodes: int, devices: int) -> None:
    if places < experts:
        raise ValueError(f"{places} places do not hold {experts} experts: give one or more for each.")
    for what, count, over, among in (
        ("experts", experts, "groups", groups),
        ("places", places, "devices", devices),
        ("devices", devices, "nodes", nodes),
    ):
        if among < 1 or count % among:
            raise ValueError(f"{count} {what} do not split over {among} {over}: choose a multiple.")
