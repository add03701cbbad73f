"""What Mosaic GPU kernels share: layouts, swizzles, sums of products, and names that moved between versions
of JAX."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
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


def emptied_slot(emptied, step, stages: int) -> Any:
    """The stage that a block is copied into, once the block that was in it is used."""
    slot = lax.rem(step, stages)

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(emptied.at[slot])

    return slot


def drain(emptied, number, stages: int) -> None:
    """Waits until the last of so many blocks, copied into stages in turn, were used.

    A program that copies for others must stay so long; and jax 0.11, interpreting, asks it of all.
    """
    last = jnp.minimum(number, stages)

    @pl.loop(0, last)
    def _(i):
        plgpu.barrier_wait(emptied.at[lax.rem(number - last + i, stages)])


def rounded(value, dtype, buffer):
    """A computed array as the left side of a product: in registers, or in a buffer, if there is one.

    There is one where jax interprets the kernel, which it cannot where products take registers.
    """
    value = value.astype(dtype)
    if buffer is None:
        return value
    buffer[...] = value
    plgpu.commit_smem()
    return buffer


def add(totals: tuple, *products: Callable, buffer) -> tuple:
    """Adds a product to each total; each is called with what it adds to. `buffer` as for `rounded`.

    Interpreted, each is computed apart: jax cannot yet start from a total there.
    """
    if buffer is None:

        def accumulate(sums):
            for total, product in zip(sums, products, strict=True):
                product(total)

        return pl.run_state(accumulate)(tuple(plgpu.ACC.init(total) for total in totals))

    def read(product, part):
        product(part)
        return part[...]

    parts = [
        pl.run_scoped(partial(read, product), plgpu.ACC(total.shape, jnp.float32))
        for total, product in zip(totals, products, strict=True)
    ]
    return tuple(total + part for total, part in zip(totals, parts, strict=True))
