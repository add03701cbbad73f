"""How a sequence lies on the devices of the expert axis: whole on one of them, or in equal parts on all.

Attention over a sequence in parts goes by heads: each device is sent its share of the heads at all positions,
attends as if it were alone, and sends back what it found (arXiv:2309.14509). All else of the model works
token by token and does not know.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.mesh import DATA, EXPERT, TOKENS

SCOPE = "context"  # by which `tools.plan` tells these exchanges from those of tokens with their experts


@dataclass(frozen=True)
class Context:
    """What depends on where the S positions of a sequence lie, S/n of them on a device."""

    sequences: tuple[str, ...]  # the axes that the sequences of a batch are split over
    positions: str | None  # the axis that their positions are split over
    # Of [..., S+1] tokens those at a device's positions and some more after them; a number where none are.
    mine: Callable[[Int[Array, "*m S+1"], int, int], Int[Array, "*m S/n+more"]]
    numbers: Callable[[int], Int[Array, "1 S/n"]]  # of so many positions of a device
    whole: Callable[[Int[Array, "B S/n"]], Int[Array, "B S"]]  # what all devices have
    by_heads: Callable[[Float[Array, "B S/n H X"]], Float[Array, "B S H/n X"]]
    by_tokens: Callable[[Float[Array, "B S H/n X"]], Float[Array, "B S/n H X"]]
    total: Callable[[Array], Array]  # from sums over a device's positions to sums over all


def _all(x: Int[Array, "*m S+1"], more: int, past: int) -> Int[Array, "*m S+more"]:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more - 1)], constant_values=past)


def _from_zero(count: int) -> Int[Array, "1 S"]:
    return jnp.arange(count)[None]


def _as_it_is(x: Array) -> Array:
    return x


WHOLE = Context(TOKENS, None, _all, _from_zero, _as_it_is, _as_it_is, _as_it_is, _as_it_is)
"""Every sequence is on one device."""


def _part(x: Int[Array, "*m S+1"], more: int, past: int) -> Int[Array, "*m S/n+more"]:
    count = (x.shape[-1] - 1) // jax.lax.axis_size(EXPERT)
    first = jax.lax.axis_index(EXPERT) * count
    return jax.lax.dynamic_slice_in_dim(_all(x, more, past), first, count + more, x.ndim - 1)


def _after_those_before(count: int) -> Int[Array, "1 S/n"]:
    return jax.lax.axis_index(EXPERT) * count + _from_zero(count)


@jax.named_scope(SCOPE)
def _gathered(x: Int[Array, "B S/n"]) -> Int[Array, "B S"]:
    return jax.lax.all_gather(x, EXPERT, axis=1, tiled=True)


@jax.named_scope(SCOPE)
def _by_heads(x: Float[Array, "B S/n H X"]) -> Float[Array, "B S H/n X"]:
    return jax.lax.all_to_all(x, EXPERT, split_axis=2, concat_axis=1, tiled=True)


@jax.named_scope(SCOPE)
def _by_tokens(x: Float[Array, "B S H/n X"]) -> Float[Array, "B S/n H X"]:
    return jax.lax.all_to_all(x, EXPERT, split_axis=1, concat_axis=2, tiled=True)


def _summed(x: Array) -> Array:
    # Typed as a value of each device, so that gradients of the sums of all devices reach each.
    return mesh.vary(jax.lax.psum(x, EXPERT))


OVER_EXPERTS = Context((DATA,), EXPERT, _part, _after_those_before, _gathered, _by_heads, _by_tokens, _summed)
"""The devices of the expert axis share each sequence, in the order of its positions."""
