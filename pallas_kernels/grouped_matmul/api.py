"""The grouped products on the platform at hand, and the gradients of those in BF16 and FP32."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels.grouped_matmul import cpu, gpu, gpu_bf16, tpu
from pallas_kernels.scaled import Scaled
from pallas_kernels.support import on_platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def matmul(
    x: Float[Array, "M K"], w: Float[Array, "G K N"], sizes: Int[Array, " G"], alignment: int = 1
) -> Float[Array, "M N"]:
    """Multiplies each group of rows by its own matrix, accumulating in FP32.

    Args:
        x: rows sorted by group; those past the last group belong to none.
        w: one matrix a group, of the type of `x`.
        sizes: rows of each group, zero allowed; data, not shape. The last group must end within M.
        alignment: of the first row of each group (see reference.py). For gradients, padding that follows a
            group must be zero, in `x` and in the cotangents.

    Returns:
        The products in the type of `x`; rows that belong to no group are undefined.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check_alignment(alignment)
    if x.shape[1] != w.shape[1] or sizes.shape[0] != w.shape[0]:
        raise ValueError(
            f"Rows of width {x.shape[1]} and {sizes.shape[0]} group sizes do not fit matrices {w.shape}: "
            "the width must be their second size and there must be one group size a matrix."
        )
    if x.dtype != w.dtype:
        raise ValueError(f"Rows are {x.dtype} but matrices are {w.dtype}: cast one to the other.")
    on = functools.partial(functools.partial, alignment=alignment)
    return on_platform(
        x,
        w,
        sizes,
        default=on(cpu.matmul),
        tpu=on(tpu.matmul),
        hopper=on(gpu_bf16.matmul) if gpu_bf16.serves(x, w, alignment) else None,
    )


def fp8_matmul(
    x: Scaled, w: Scaled, sizes: Int[Array, " G"], alignment: int = 1, dtype=jnp.bfloat16
) -> Float[Array, "M N"]:
    """Multiplies each group of FP8 rows by its own transposed matrix and applies the scales in FP32.

    Args:
        x: [M, K], tiles of one row and g columns, sorted by group.
        w: [G, N, K], tiles of any number of rows and the same g columns.
        sizes: rows of each group, zero allowed; data, not shape. The last group must end within M.
        alignment: of the first row of each group (see reference.py).
        dtype: of the result.

    Returns:
        The products; rows that belong to no group are undefined.

    Raises:
        ValueError: if shapes or tiles do not fit.
    """
    _check_alignment(alignment)
    if x.shape[1] != w.shape[2] or sizes.shape[0] != w.shape[0]:
        raise ValueError(
            f"Rows of width {x.shape[1]} and {sizes.shape[0]} group sizes do not fit matrices {w.shape}: "
            "the width must be their third size and there must be one group size a matrix."
        )
    if x.tile[0] != 1 or x.tile[1] != w.tile[1]:
        raise ValueError(
            f"Rows with tiles {x.tile} and matrices with tiles {w.tile} need the same number of columns in "
            "both, and one row in the first: quantise them again."
        )
    on = lambda module: functools.partial(module.fp8_matmul, alignment=alignment, dtype=dtype)  # noqa: E731
    return on_platform(
        x,
        w,
        sizes,
        default=on(cpu),
        tpu=on(tpu) if tpu.serves_fp8(x) else None,
        hopper=on(gpu) if gpu.serves(x, w, alignment, dtype) else None,
    )


def fp8_weight_gradient(
    x: Scaled,
    y: Scaled,
    sizes: Int[Array, " G"],
    alignment: int = 128,
    into: Float32[Array, "G I O"] | None = None,
) -> Float32[Array, "G I O"]:
    """Sums the outer products of two matrices' FP8 columns over the columns of each group, in FP32.

    Args:
        x: [I, M], tiles of one row and g columns; columns are sorted by group.
        y: [O, M], with the same tiles.
        sizes: columns of each group, zero allowed; data, not shape. The last group must end within M.
        alignment: of the first column of each group (see reference.py); a multiple of g, so that no tile
            holds columns of two groups. Padding that follows a group must be zero in both operands.
        into: sums that these are added to, as gradients of several micro-batches are.

    Returns:
        The sums; zeros, or `into`, for an empty group.

    Raises:
        ValueError: if shapes, tiles or the alignment do not fit.
    """
    _check_alignment(alignment)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Sums over {x.shape[1]} columns and over {y.shape[1]} do not fit: give both as many."
        )
    if x.tile != y.tile or x.tile[0] != 1:
        raise ValueError(
            f"Columns with tiles {x.tile} and {y.tile} need equal tiles of one row: quantise them again."
        )
    if alignment % x.tile[1]:
        raise ValueError(
            f"Groups that start at multiples of {alignment} share tiles of {x.tile[1]} columns: "
            f"align them to a multiple of {x.tile[1]}."
        )
    if into is not None and into.shape != (sizes.shape[0], x.shape[0], y.shape[0]):
        raise ValueError(
            f"Sums of shape {into.shape} cannot take those of {sizes.shape[0]} groups, {x.shape[0]} rows and "
            f"{y.shape[0]} rows: give an array of that shape."
        )
    into_last = lambda f: lambda x, y, sizes, into: f.fp8_weight_gradient(x, y, sizes, alignment, into)  # noqa: E731
    return on_platform(
        x,
        y,
        sizes,
        into,
        default=into_last(cpu),
        tpu=into_last(tpu) if tpu.serves_fp8(x) else None,
        hopper=into_last(gpu) if gpu.serves_gradient(x, y) else None,
    )


def _check_alignment(alignment: int) -> None:
    if alignment < 1:
        raise ValueError(f"An alignment of {alignment} rows has no multiples to start at: give at least 1.")


def _forward(x, w, sizes, alignment):
    return matmul(x, w, sizes, alignment), (x, w, sizes)


def _backward(alignment, saved, g):
    x, w, sizes = saved
    hopper = gpu_bf16.serves(x, w, alignment)
    on = functools.partial(functools.partial, alignment=alignment)
    dx = on_platform(
        g,
        w,
        sizes,
        default=on(lambda g, w, sizes, alignment: cpu.matmul(g, jnp.swapaxes(w, 1, 2), sizes, alignment)),
        tpu=on(tpu.matmul_transposed),
        hopper=on(gpu_bf16.matmul_transposed) if hopper else None,
    )
    dw = on_platform(
        x,
        g,
        sizes,
        default=on(cpu.weight_gradient),
        tpu=on(tpu.weight_gradient),
        hopper=on(gpu_bf16.weight_gradient) if hopper else None,
    )
    return dx, dw, None


matmul.defvjp(_forward, _backward)
