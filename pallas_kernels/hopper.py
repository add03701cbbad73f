"""What Mosaic GPU kernels share: layouts, swizzles, and the names that moved between versions of JAX."""

import inspect

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value for each row of an accumulator
COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one for each column
SMS = 132  # of an H100 and an H200

_index = inspect.signature(plgpu.load).parameters.get("idx")  # asked for by jax 0.10, refused by 0.12
_LOAD_NEEDS_INDEX = _index is not None and _index.default is inspect.Parameter.empty


def load(ref, layout: plgpu.Layout, **options):
    """Loads a whole reference into registers of a layout."""
    index = ((),) if _LOAD_NEEDS_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, **options)


def store(ref, value) -> None:
    """Stores to device memory in pieces that may be smaller than a sector, which jax 0.12 asks about."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = value


def swizzled(columns: int, dtype) -> tuple:
    """The transforms of a tile in shared memory, with rows of so many columns, that wgmma and TMA read."""
    item = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * item * 8)
    return plgpu.TilingTransform((8, swizzle // item)), plgpu.SwizzleTransform(swizzle)


def compiler_params(**options) -> plgpu.CompilerParams:
    """Warpgroup semantics, which are not the default of every version."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **options)
