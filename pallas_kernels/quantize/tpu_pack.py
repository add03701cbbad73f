"""12 bits a value on TPU: each block is read once, and bits move inside their lanes only."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.quantize import e5m6, tuning
from pallas_kernels.quantize.reference import TILE, e5m6_scale
from pallas_kernels.quantize.tpu import each
from pallas_kernels.support import out_like

_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tuning.TPU_VMEM)
_kernel_entry = partial(jax.jit, static_argnames=("rows", "interpret"))


def serves(rows: int, columns: int) -> bool:
    """Whether both halves of a row are whole tiles, and rows fit in memory."""
    return rows > 0 and columns % (2 * TILE) == 0 and tuning.tpu_fits(columns)


@_kernel_entry
def pack(
    x: Float[Array, "M K"], *, rows: int | None = None, interpret=False
) -> tuple[UInt8[Array, "M 3 K/2"], Float32[Array, "M KT"]]:
    """The definition's. The planes of bytes lie one after the other, which XLA takes as a layout."""
    m, k = x.shape
    rows = rows or tuning.tpu_rows(m, k * x.dtype.itemsize)
    planes, scales = pl.pallas_call(
        _pack_kernel,
        grid=(pl.cdiv(m, rows),),
        in_specs=[pl.BlockSpec((rows, k), lambda i: (i, 0))],
        out_specs=[
            pl.BlockSpec((3, rows, k // 2), lambda i: (0, i, 0)),
            pl.BlockSpec((rows, k // TILE), lambda i: (i, 0)),
        ],
        out_shape=[out_like((3, m, k // 2), jnp.uint8, x), out_like((m, k // TILE), jnp.float32, x)],
        compiler_params=_PARAMS,
        interpret=interpret,
    )(x)
    return jnp.swapaxes(planes, 0, 1), scales


@_kernel_entry
def unpack(
    bits: UInt8[Array, "M 3 K/2"],
    scales: Float32[Array, "M KT"],
    *,
    rows: int | None = None,
    interpret=False,
) -> Float[Array, "M K"]:
    """The definition's."""
    m, k = len(bits), 2 * bits.shape[2]
    rows = rows or tuning.tpu_rows(m, k * 2)
    return pl.pallas_call(
        _unpack_kernel,
        grid=(pl.cdiv(m, rows),),
        in_specs=[
            pl.BlockSpec((3, rows, k // 2), lambda i: (0, i, 0)),
            pl.BlockSpec((rows, k // TILE), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((rows, k), lambda i: (i, 0)),
        out_shape=out_like((m, k), jnp.bfloat16, bits, scales),
        compiler_params=_PARAMS,
        interpret=interpret,
    )(jnp.swapaxes(bits, 0, 1), scales)


def _pack_kernel(x, planes, scales):
    """Some whole rows, a few at a time: a tile of the first half with that of the second beside it."""
    half = planes.shape[2]

    def codes(some, column) -> Int32[Array, "R C"]:
        piece = x[some, column : column + TILE].astype(jnp.float32)
        scale = e5m6_scale(jnp.max(jnp.abs(piece), axis=1, keepdims=True))
        scales[some, column // TILE : column // TILE + 1] = scale
        return e5m6.code(piece * (1 / scale))

    def chunk(_, some):
        for column in range(0, half, TILE):
            both = codes(some, column), codes(some, half + column)
            for plane, byte in enumerate(e5m6.to_bytes(*both)):
                planes[plane, some, column : column + TILE] = byte.astype(jnp.uint8)

    each(x.shape[0], tuning.tpu_chunk(scales.shape[1]), chunk)


def _unpack_kernel(planes, scales, out):
    """Some whole rows, a few at a time."""
    half = planes.shape[2]

    def write(some, column, code):
        scale = scales[some, column // TILE : column // TILE + 1]
        out[some, column : column + TILE] = (e5m6.value(code) * scale).astype(jnp.bfloat16)

    def chunk(_, some):
        for column in range(0, half, TILE):
            read = (planes[plane, some, column : column + TILE].astype(jnp.int32) for plane in range(3))
            first, second = e5m6.from_bytes(*read)
            write(some, column, first)
            write(some, half + column, second)

    each(out.shape[0], tuning.tpu_chunk(scales.shape[1]), chunk)
