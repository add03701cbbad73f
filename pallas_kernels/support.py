"""What every kernel needs of JAX and JAX does not promise: the types of arrays that differ between devices.

These are the only functions that use the names that moved between versions of JAX.
"""

from collections.abc import Collection

import jax


def vary_over(x: jax.Array, axes: Collection[str]) -> jax.Array:
    """Types `x` as varying over these mesh axes, in addition to those it varies over already."""
    missing = tuple(a for a in axes if a not in _varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Types `x` as varying over every mesh axis that an input varies over; outside `shard_map`, over none."""
    return vary_over(x, sorted({axis for i in inputs for axis in _varying(i)}))


def _varying(x: jax.Array) -> Collection[str]:
    return jax.typeof(x).manual_axis_type.varying
