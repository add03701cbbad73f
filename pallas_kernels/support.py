"""What every kernel needs of JAX and JAX does not promise: types of arrays that differ between devices, and
the choice of a kernel by platform.

These are the only functions that use the names that moved between versions of JAX.
"""

from collections.abc import Callable, Collection

import jax
from jax.experimental import pallas as pl


def vary_over(x: jax.Array, axes: Collection[str]) -> jax.Array:
    """Types `x` as varying over these mesh axes, in addition to those it varies over already."""
    missing = tuple(a for a in axes if a not in _varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, *inputs) -> jax.Array:
    """Types `x` as varying over every mesh axis that an input varies over; outside `shard_map`, over none."""
    return vary_over(x, sorted(_varying_of_any(inputs)))


def out_like(shape: tuple[int, ...], dtype, *inputs) -> jax.ShapeDtypeStruct:
    """A kernel's output, which varies over every mesh axis that an input (an array or a tree) does."""
    varying = jax.sharding.ManualAxisType(varying=_varying_of_any(inputs))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def cost(flops: float, operands, *made: jax.ShapeDtypeStruct) -> pl.CostEstimate:
    """What a kernel takes, for a compiler that places communication beside it: each array moves once."""
    arrays = [*jax.tree.leaves(operands), *made]
    return pl.CostEstimate(
        flops=int(flops), bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays), transcendentals=0
    )


def on_platform(
    *operands,
    default: Callable,
    cpu: Callable | None = None,
    tpu: Callable | None = None,
    hopper: Callable | None = None,
):
    """Calls the implementation for the platform that the program is compiled for.

    A GPU other than Hopper runs the default: it lacks the instructions that our GPU kernels are made of.
    """

    def typed(f: Callable) -> Callable:
        # All must give one type, and Mosaic GPU of jax 0.10 forgets over which axes its outputs vary.
        return lambda *operands: jax.tree.map(lambda y: vary_like(y, *operands), f(*operands))

    kernels = {"cpu": cpu, "tpu": tpu, "cuda": hopper if _only_hopper() else None}
    chosen = {name: typed(f) for name, f in kernels.items() if f is not None}
    return jax.lax.platform_dependent(*operands, default=typed(default), **chosen)


def _only_hopper() -> bool:
    """Whether every GPU at hand is one; true without GPUs, where programs are compiled for others."""
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    return all(getattr(device, "compute_capability", None) == "9.0" for device in gpus)


def _varying(x: jax.Array) -> Collection[str]:
    return jax.typeof(x).manual_axis_type.varying


def _varying_of_any(inputs) -> frozenset[str]:
    return frozenset(axis for leaf in jax.tree.leaves(inputs) for axis in _varying(leaf))
