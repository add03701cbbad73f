"""How blocks of rows travel between the n devices of the expert axis: block i of device j becomes block j of
device i.

The way there and the way back may differ: FP8 out to the experts and BF16 home, in both passes
(arXiv:2412.19437, section 3.3.3).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.mesh import EXPERT
from pallas_kernels import all_to_all, quantize
from pallas_kernels.all_to_all import Rows
from pallas_kernels.scaled import E4M3, Scaled, dequantize, power_of_two
from pallas_kernels.support import vary_like, vary_over

Groups = tuple[tuple[int, ...], ...] | None
"""Devices of the expert axis that exchange with each other alone; None for all."""

Exchange = Callable[[Float[Array, "n T D"], Rows, Groups], Float[Array, "n T D"]]


def swap(x: Array, groups: Groups = None) -> Array:
    """Block i of device j of a group becomes block j of its device i; any array of n blocks of rows."""
    return jax.lax.all_to_all(x, EXPERT, split_axis=0, concat_axis=0, tiled=True, axis_index_groups=groups)


def scheduled(x: Float[Array, "n T D"], rows: Rows, groups: Groups = None) -> Float[Array, "n T D"]:
    """XLA's all-to-all, which sends unused room too, and which XLA places beside other work."""
    return swap(x, groups)


def ragged(x: Float[Array, "n T D"], rows: Rows, groups: Groups = None) -> Float[Array, "n T D"]:
    """XLA's ragged all-to-all on GPU and TPU, which sends only the rows that there are.

    What is not sent arrives as zeros. On TPU XLA waits for it at once (libtpu 0.0.50).
    """

    def some(x, sent, received):
        n, room, width = x.shape
        first = room * jnp.arange(n, dtype=jnp.int32)
        place = jax.lax.axis_index(EXPERT)
        if groups is not None:
            place = jnp.argmax(jnp.any(jnp.asarray(groups) == place, axis=0)).astype(jnp.int32)
        mine = jnp.full(n, room * place, jnp.int32)  # where these blocks go in the memory of every receiver
        out = vary_like(jnp.zeros((n * room, width), x.dtype), x, sent)
        arrived = jax.lax.ragged_all_to_all(
            *(x.reshape(-1, width), out, first, sent, mine, received),
            axis_name=EXPERT,
            axis_index_groups=groups,
        )
        return arrived.reshape(x.shape)

    def every(x, sent, received):
        return scheduled(all_to_all.first(x, sent), rows, groups)

    return jax.lax.platform_dependent(x, *rows, default=every, cuda=some, tpu=some)


def direct(x: Float[Array, "n T D"], rows: Rows, groups: Groups = None) -> Float[Array, "n T D"]:
    """On TPU writes only the rows that there are into the receiver's memory.

    It waits for them, but for a pair of layers: what stands beside an exchange there is not left to XLA.

    Raises:
        ValueError: if it is to be within groups.
    """
    if groups is not None:
        raise ValueError(
            f"The direct exchange knows no groups of the expert axis, but is to run in {len(groups)}: take "
            "`scheduled` or `ragged` where the axis spans hosts."
        )
    return jax.jit(_direct)(x, *rows)


def _direct(x: Array, sent: Array, received: Array) -> Array:
    return all_to_all.exchange(x, EXPERT, Rows(sent, received))


NAME = _direct.__name__
"""That of the call which a program holds for `direct`, of blocks and two lists of counts."""


@dataclass(frozen=True)
class InFp8:
    """Sends E4M3 with a power-of-two scale a row and 128 columns, a byte each: half the bytes of BF16.

    A product that quantises what arrives in the same way finds the same FP8 numbers.
    """

    exchange: Exchange

    def __call__(self, x: Float[Array, "n T D"], rows: Rows, groups: Groups = None) -> Float[Array, "n T D"]:
        """Quantises, exchanges and multiplies by the scales."""
        width = x.shape[2]
        scaled = quantize.quantize(x.reshape(-1, width), scale=power_of_two)
        exponents = jax.lax.bitcast_convert_type(scaled.scales, jnp.int32) >> 23
        values = jax.lax.bitcast_convert_type(scaled.values, jnp.uint8)
        bits = jnp.concatenate([values, exponents.astype(jnp.uint8)], axis=1)
        bits = self.exchange(bits.reshape(*x.shape[:2], -1), rows, groups).reshape(bits.shape)
        values = jax.lax.bitcast_convert_type(bits[:, :width], E4M3)
        scales = jax.lax.bitcast_convert_type(bits[:, width:].astype(jnp.int32) << 23, jnp.float32)
        return dequantize(Scaled(values, scales, scaled.tile)).astype(x.dtype).reshape(x.shape)


def cross(
    there: Exchange, back: Exchange, x: Float[Array, "n T D"], rows: Rows, groups: Groups = None
) -> Float[Array, "n T D"]:
    """`there(x, rows, groups)`, whose gradient comes home by `back`."""
    return _cross(there, back, groups, vary_over(x, (EXPERT,)), rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross(there: Exchange, back: Exchange, groups: Groups, x: Array, rows: Rows) -> Array:
    return there(x, rows, groups)


_cross.defvjp(
    lambda there, back, groups, x, rows: (there(x, rows, groups), rows),
    lambda there, back, groups, rows, g: (back(g, rows.back(), groups), None),
)


class Apart(NamedTuple):
    """Both halves of exchanges that take place together, between which work may stand."""

    start: Callable[..., list]  # of the operands: one thing begun for each exchange
    hold: Callable[[Any, Any], tuple[Any, Any]]  # what was begun and other arrays, until all are there
    done: Callable[..., list[Array]]  # of what was begun, and the operands


def apart(exchanges: Sequence[Sequence[int]], operands: Sequence[Any]) -> Apart | None:
    """The halves of calls `NAME`; only the kernels for TPUs have any.

    Args:
        exchanges: for each, which of the operands are its blocks and counts.
        operands: arrays, or their types.
    """
    on = jax.sharding.get_abstract_mesh().abstract_device
    if on is None or on.platform != "tpu":
        return None
    if not all(all_to_all.serves(operands[x], Rows(*(operands[n] for n in rows))) for x, *rows in exchanges):
        return None

    def start(*given):
        return [all_to_all.start(given[x], Rows(*(given[n] for n in rows)), EXPERT) for x, *rows in exchanges]

    def done(begun, *given):
        every = zip(begun, exchanges, strict=True)
        return [all_to_all.done(one, Rows(*(given[n] for n in rows)), EXPERT) for one, (_, *rows) in every]

    return Apart(start, all_to_all.hold, done)
