"""The scaled product on the platform at hand."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8_matmul import gpu, reference, tpu
from pallas_kernels.scaled import E4M3, Scaled, tiles
from pallas_kernels.support import on_platform


def matmul(
    x: Scaled, w: Scaled, into: Float32[Array, "M N"] | None = None, dtype=jnp.bfloat16
) -> Float[Array, "M N"]:
    """Multiplies FP8 operands and applies their scales in FP32, every time that a tile of K ends.

    Args:
        x: [M, K], tiles of one row and g columns.
        w: [N, K], tiles of any number of rows (128 for weights, 1 for a gradient's second operand) and the
            same g columns.
        into: FP32 sums that the product is added to, as gradients of several micro-batches are.
        dtype: of the result; FP32 where `into` is given.

    Raises:
        ValueError: if shapes, tiles or types do not fit.
    """
    _check(x, w, into)
    dtype = jnp.dtype(jnp.float32 if into is not None else dtype)
    operands = (x, w) if into is None else (x, w, into)
    return on_platform(
        *operands,
        default=partial(reference.matmul, dtype=dtype),
        tpu=partial(tpu.matmul, dtype=dtype) if tpu.serves(x) else None,
        hopper=partial(gpu.matmul, dtype=dtype) if gpu.serves(x, w, dtype) else None,
    )


def _check(x: Scaled, w: Scaled, into: Array | None) -> None:
    if x.shape[1] != w.shape[1] or x.tile[1] != w.tile[1] or x.tile[0] != 1:
        raise ValueError(
            f"A product of {x.shape} with tiles {x.tile} and {w.shape} with tiles {w.tile} needs the same "
            "number of columns in both and in their tiles, and tiles of one row in the first: quantise them "
            "again."
        )
    for operand in (x, w):
        covered = tuple(map(tiles, operand.shape, operand.tile))
        if operand.values.dtype != E4M3 or operand.scales.shape != covered:
            raise ValueError(
                f"{operand.values.dtype} values of shape {operand.shape} in tiles {operand.tile} with scales "
                f"of shape {operand.scales.shape} are no quantised matrix, which has float8_e4m3fn values "
                f"and {covered} scales: make it with `quantize`."
            )
    want = (x.shape[0], w.shape[0])
    if into is not None and (into.shape != want or into.dtype != jnp.float32):
        raise ValueError(
            f"A product of shape {want} cannot be added to {into.dtype} sums of shape {into.shape}: give "
            "float32 sums of its shape."
        )
