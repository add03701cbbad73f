"""The exchange on the platform at hand, inside `shard_map`, with its gradient: the exchange back.

The TPU kernel writes blocks into the memory of their receivers, all links at once. Other platforms, and
shapes that it does not serve, run XLA's all-to-all, which sends every row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from pallas_kernels.all_to_all import reference, tpu
from pallas_kernels.all_to_all.reference import Rows
from pallas_kernels.support import on_platform, vary_like, vary_over

Tree = TypeVar("Tree")


def exchange(x: Shaped[Array, "n T D"], axis: str, rows: Rows | None = None) -> Shaped[Array, "n T D"]:
    """Block i of device j becomes block j of device i, of the n devices of one mesh axis.

    Args:
        rows: how many rows of each block there are to send, from `agree`. On TPU bytes on the links follow
            them, in steps of `tpu.CHUNK` rows. All others arrive as zeros. None sends every row.

    Raises:
        ValueError: if there is not one block for each device.
    """
    x, rows = _checked(x, axis, rows)
    return _exchange(axis, x, rows)


def agree(sent: Int[Array, " n"], axis: str) -> Rows:
    """Tells each device how many rows it will receive: an all-to-all of one number a pair."""
    sent = vary_over(sent.astype(jnp.int32), (axis,))
    return Rows(sent, jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0, tiled=True))


def overlap(
    work: Callable[..., Tree],
    operands: tuple,
    x: Shaped[Array, "n T D"],
    axis: str,
    rows: Rows | None = None,
) -> tuple[Shaped[Array, "n T D"], Tree]:
    """`exchange(x, axis, rows), work(*operands)`, the work between the start and the end of the exchange.

    On TPU these are two kernels, and barriers hold between them what depends on the operands; elsewhere XLA
    schedules. There is no start and end to call apart: the semaphores that they share exist in TPU programs
    only, so no choice by platform could return them. What the work takes from its closure is a constant. Its
    backward pass stands between the start and the end of the exchange back, and computes the work once more
    first, as a checkpointed block does.

    Raises:
        ValueError: if there is not one block for each device.
    """
    x, rows = _checked(x, axis, rows)
    x, rows, operands = _alike((x, rows, operands))
    return _overlap(lambda *a: jax.tree.map(lambda y: vary_like(y, *a, x), work(*a)), axis, operands, x, rows)


def _checked(x: Array, axis: str, rows: Rows | None) -> tuple[Array, Rows | None]:
    n = jax.lax.axis_size(axis)
    if x.ndim != 3 or len(x) != n:
        raise ValueError(
            f"An array of shape {x.shape} is not one block of rows for each of the {n} devices of axis "
            f"{axis!r}: give one of shape ({n}, T, D)."
        )
    if rows is not None and not rows.sent.shape == rows.received.shape == (n,):
        raise ValueError(
            f"Counts of shape {rows.sent.shape} and {rows.received.shape} are not one for each of the {n} "
            f"devices of axis {axis!r}: make them with `agree`."
        )
    # The result differs between the devices even where the blocks do not.
    return _alike((vary_over(x, (axis,)), rows))


def _alike(tree: Tree) -> Tree:
    """All varying over the same axes, so that sums of gradients are outside of the rules below."""
    return jax.tree.map(lambda a: vary_like(a, tree), tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(axis: str, x: Array, rows: Rows | None) -> Array:
    return on_platform(
        *(x, rows),
        default=partial(reference.exchange, axis=axis),
        tpu=partial(tpu.exchange, axis=axis) if tpu.serves(x, rows) else None,
    )


def _exchange_backward(axis: str, rows: Rows | None, g: Array):
    if g.dtype == jax.dtypes.float0:
        return np.zeros(g.shape, jax.dtypes.float0), None
    return _exchange(axis, g, _back(rows)), None


_exchange.defvjp(lambda axis, x, rows: (_exchange(axis, x, rows), rows), _exchange_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _overlap(work: Callable, axis: str, operands: tuple, x: Array, rows: Rows | None) -> tuple[Array, Any]:
    def apart(operands, x, rows):
        return reference.exchange(x, rows, axis), work(*operands)

    return on_platform(
        *(operands, x, rows),
        default=apart,
        tpu=partial(tpu.overlap, work, axis=axis) if tpu.serves(x, rows) else None,
    )


def _overlap_forward(work: Callable, axis: str, operands: tuple, x: Array, rows: Rows | None):
    return _overlap(work, axis, operands, x, rows), (operands, rows)


def _overlap_backward(work: Callable, axis: str, kept: tuple, g: tuple):
    operands, rows = kept
    if g[0].dtype == jax.dtypes.float0:
        return jax.vjp(work, *operands)[1](g[1]), np.zeros(g[0].shape, jax.dtypes.float0), None
    given = _numbers(g[1])

    def pull(operands, given):
        return _numbers(jax.vjp(work, *operands)[1](_tree_of(given, g[1])))

    both: Any = _overlap(pull, axis, (operands, given), g[0], _back(rows))
    return _tree_of(both[1], operands), both[0], None


_overlap.defvjp(_overlap_forward, _overlap_backward)


def _back(rows: Rows | None) -> Rows | None:
    return None if rows is None else rows.back()


def _numbers(cotangents) -> list[Array]:
    """The cotangents that are more than a type: not those of integers."""
    return [g for g in jax.tree.leaves(cotangents) if g.dtype != jax.dtypes.float0]


def _tree_of(numbers: list[Array], like: Tree) -> Tree:
    """`_numbers` undone, for values or cotangents of this form."""
    left = iter(numbers)
    is_number = lambda a: jnp.issubdtype(a.dtype, jnp.inexact)  # noqa: E731
    zero = lambda a: np.zeros(a.shape, jax.dtypes.float0)  # noqa: E731
    return jax.tree.map(lambda a: next(left) if is_number(a) else zero(a), like)
