"""Quantisation on the platform at hand.

Kernels serve matrices in tiles of one row (or 128 tokens) and 128 columns and in squares of 128, SwiGLU fused
with the first and its backward pass, and 12 bits. The definition serves the rest: stacks and other tiles.
"""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.quantize import gpu, gpu_pack, reference, tpu, tpu_pack
from pallas_kernels.quantize.reference import TILE
from pallas_kernels.scaled import Scale, Scaled, exact, power_of_two, tiles
from pallas_kernels.support import on_platform


def quantize(x: Float[Array, "*g M K"], tile: tuple[int, int] = (1, TILE), scale: Scale = exact) -> Scaled:
    """E4M3 with a scale for each tile of rows and columns, from the largest magnitude in it.

    Raises:
        ValueError: if types or tiles do not fit.
    """
    _check_values(x)
    if min(tile) < 1:
        raise ValueError(f"A tile of {tile} rows and columns covers nothing: give at least one of each.")
    known = x.ndim == 2 and tile in ((1, TILE), (TILE, TILE)) and _known(x, scale)
    kernel = lambda module: partial(module.quantize if tile[0] == 1 else module.blocks, scale=scale)  # noqa: E731
    return on_platform(
        x,
        default=partial(reference.quantize, tile=tile, scale=scale),
        tpu=kernel(tpu) if known and tpu.serves(x.shape[1]) else None,
        hopper=kernel(gpu) if known and gpu.serves(x.shape[1]) else None,
    )


def transposed(x: Float[Array, "M K"] | Scaled, tile: int = TILE, scale: Scale = exact) -> Scaled:
    """[K, M] with a scale for each row and `tile` columns: the form in which tokens are summed over.

    FP8 rows are read, multiplied by their scales and quantised again along the other axis.

    Raises:
        ValueError: if types or tiles do not fit.
    """
    _check_values(x)
    if len(x.shape) != 2 or tile < 1:
        raise ValueError(
            f"An array of shape {x.shape} is not quantised in tiles of {tile} tokens: give a matrix and at "
            "least one token."
        )
    known = tile == TILE and _known(x, scale)
    return on_platform(
        x,
        default=partial(reference.transposed, tile=tile, scale=scale),
        tpu=partial(tpu.transposed, scale=scale) if known else None,
        hopper=partial(gpu.transposed, scale=scale) if known and gpu.serves(*x.shape) else None,
    )


def swiglu(
    hidden: Float[Array, "M 2F"] | Scaled, weights: Float[Array, " M"] | None, scale: Scale = exact
) -> Scaled:
    """silu(gate) * up * weight, of gate columns and then those of up, quantised by row and 128 columns.

    All in FP32; nothing is rounded before the values are. Kernels differ from the definition by the last bits
    of an exponential: a scale by as much, a value by at most one step of E4M3.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check_hidden(hidden, weights)
    width = hidden.shape[1] // 2
    known = width % TILE == 0 and _known(hidden, scale)
    return on_platform(
        *(hidden, weights),
        default=partial(reference.swiglu, scale=scale),
        tpu=partial(tpu.swiglu, scale=scale) if known and tpu.serves(2 * width) else None,
        hopper=partial(gpu.swiglu, scale=scale) if known and gpu.serves(width) else None,
    )


def swiglu_transposed(
    hidden: Float[Array, "M 2F"] | Scaled, weights: Float[Array, " M"] | None, scale: Scale = exact
) -> Scaled:
    """The same activation as [F, M], quantised along tokens, for the gradient of the next weight.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check_hidden(hidden, weights)
    rows, width = hidden.shape[0], hidden.shape[1] // 2
    known = width % TILE == 0 and _known(hidden, scale)
    return on_platform(
        *(hidden, weights),
        default=partial(reference.swiglu_transposed, scale=scale),
        tpu=partial(tpu.swiglu_transposed, scale=scale) if known else None,
        hopper=partial(gpu.swiglu_transposed, scale=scale) if known and gpu.serves(rows, width) else None,
    )


def swiglu_backward(
    hidden: Float[Array, "M 2F"] | Scaled, weights: Float[Array, " M"] | None, g: Float[Array, "M F"]
) -> tuple[Float[Array, "M 2F"], Float32[Array, " M"] | None]:
    """The cotangents of `hidden`, in the type of `g`, and of `weights`, from that of the activation.

    Kernels read each number once and sum in another order. XLA's program for the definition stores FP32
    numbers on the way: for 32768 rows of 2048 it moves 6 times the bytes of its arguments and results on v5p
    (jax 0.12.0, by the compiler's count), and on H200 2.5 times (jax 0.11.2, operands and results of its
    fusions).

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check_hidden(hidden, weights)
    _check_values(g)
    want = hidden.shape[0], hidden.shape[1] // 2
    if g.shape != want:
        raise ValueError(
            f"A cotangent of shape {g.shape} is not one of an activation of shape {want}: give one number "
            "for each of its values."
        )
    known = want[1] % TILE == 0 and _known(hidden, exact)
    return on_platform(
        *(hidden, weights, g),
        default=reference.swiglu_backward,
        tpu=tpu.swiglu_backward if known and tpu.serves(hidden.shape[1]) else None,
        hopper=gpu.swiglu_backward if known else None,
    )


def pack(x: Float[Array, "M K"]) -> tuple[UInt8[Array, "M 3 K/2"], Float32[Array, "M KT"]]:
    """12 bits a value: sign, 5 bits of exponent, 6 of mantissa (E5M6), and a power of two for each 1 x 128.

    The layout is in the definition. Kernels read each number once. XLA's program for the definition moves,
    for 4096 rows of 16384 on v5p, 10 times the bytes of its arguments and results, and 4 times in `unpack`
    (jax 0.12.0, by the compiler's count); on H200 1.6 times and no more than it must (jax 0.11.2, operands
    and results of its fusions).

    Raises:
        ValueError: if the number of columns is odd, or the type not BF16 or FP32.
    """
    _check_values(x)
    if x.ndim != 2 or x.shape[1] % 2:
        raise ValueError(
            f"An array of shape {x.shape} is not packed in pairs of columns: give a matrix with an even "
            "number of them."
        )
    return on_platform(
        x,
        default=reference.pack,
        tpu=tpu_pack.pack if tpu_pack.serves(*x.shape) else None,
        hopper=gpu_pack.pack if gpu_pack.serves(*x.shape) else None,
    )


def unpack(bits: UInt8[Array, "M 3 K/2"], scales: Float32[Array, "M KT"]) -> Float[Array, "M K"]:
    """The packed numbers in BF16, which holds them exactly.

    Raises:
        ValueError: if these are not what `pack` makes.
    """
    if bits.ndim != 3 or bits.shape[1] != 3 or scales.shape != (len(bits), tiles(2 * bits.shape[2], TILE)):
        raise ValueError(
            f"Bits of shape {bits.shape} and scales of shape {scales.shape} are no packed matrix: make them "
            "with `pack`."
        )
    shape = len(bits), 2 * bits.shape[2]
    return on_platform(
        *(bits, scales),
        default=reference.unpack,
        tpu=tpu_pack.unpack if tpu_pack.serves(*shape) else None,
        hopper=gpu_pack.unpack if gpu_pack.serves(*shape) else None,
    )


def _check_values(x: Array | Scaled) -> None:
    if not isinstance(x, Scaled) and x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"Values in {x.dtype} are not quantised: cast them to bfloat16 or float32.")


def _check_hidden(hidden: Array | Scaled, weights: Array | None) -> None:
    _check_values(hidden)
    if len(hidden.shape) != 2 or hidden.shape[1] % 2:
        raise ValueError(
            f"An array of shape {hidden.shape} is not gate columns and as many of up: give a matrix of both."
        )
    if weights is not None and weights.shape != hidden.shape[:1]:
        raise ValueError(
            f"Weights of shape {weights.shape} are not one for each of {hidden.shape[0]} rows: give as many."
        )


def _known(x: Array | Scaled, scale: Scale) -> bool:
    """Whether kernels can read this, and compute this scale."""
    tiled = not isinstance(x, Scaled) or x.tile == (1, TILE)
    return tiled and scale in (exact, power_of_two) and min(x.shape) > 0
