"""12 bits a value on TPU: each block is read once, and bits move inside their lanes only.

Vectors have no FP16, so codes are made and read as integers: the exponent of FP32 less 112 is that of E5M6.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32, UInt8

from pallas_kernels.quantize import tuning
from pallas_kernels.quantize.reference import LEAST_NORMAL, TILE, e5m6_scale
from pallas_kernels.quantize.tpu import each
from pallas_kernels.support import out_like

_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tuning.TPU_VMEM)
_kernel_entry = partial(jax.jit, static_argnames=("rows", "interpret"))
_DROPPED = 17  # bits of FP32's mantissa that E5M6 lacks
_EXPONENTS = 112 << 23  # between the exponents of FP32 and those of E5M6, in bits of FP32
_SIGN, _NAN, _INFINITE, _NORMAL = 0x800, 0x7E0, 0x7C0, 0x40
_STEPS = 8.0  # FP32 numbers from here on are as far apart as E5M6's below the least normal one: 2^-20
_STEPS_BITS = 0x41000000


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
        return _code(piece * (1 / scale))

    def chunk(_, some):
        for column in range(0, half, TILE):
            a, b = codes(some, column), codes(some, half + column)
            bytes_ = (a & 0xFF, (a >> 8) | ((b & 0xF) << 4), b >> 4)
            for plane, byte in enumerate(bytes_):
                planes[plane, some, column : column + TILE] = byte.astype(jnp.uint8)

    each(x.shape[0], tuning.tpu_chunk(scales.shape[1]), chunk)


def _unpack_kernel(planes, scales, out):
    """Some whole rows, a few at a time."""
    half = planes.shape[2]

    def write(some, column, code):
        scale = scales[some, column // TILE : column // TILE + 1]
        out[some, column : column + TILE] = (_value(code) * scale).astype(jnp.bfloat16)

    def chunk(_, some):
        for column in range(0, half, TILE):
            low, middle, high = (
                planes[plane, some, column : column + TILE].astype(jnp.int32) for plane in range(3)
            )
            write(some, column, low | ((middle & 0xF) << 8))
            write(some, half + column, (middle >> 4) | (high << 4))

    each(out.shape[0], tuning.tpu_chunk(scales.shape[1]), chunk)


def _code(x: Float32[Array, "R C"]) -> Int32[Array, "R C"]:
    """Of the nearest number, ties to even; magnitudes are 2^15 at most, or not finite, which becomes NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = jnp.abs(x)
    above = bits & 0x7FFFFFFF
    normal = (above + (0xFFFF - _EXPONENTS) + ((bits >> _DROPPED) & 1)) >> _DROPPED
    small = lax.bitcast_convert_type(magnitude + _STEPS, jnp.int32) - _STEPS_BITS
    code = jnp.minimum(jnp.where(magnitude < LEAST_NORMAL, small, normal), _NAN)
    return code | ((bits >> 20) & _SIGN)


def _value(code: Int32[Array, "R C"]) -> Float32[Array, "R C"]:
    above = code & (_SIGN - 1)
    shift = jnp.where(above < _INFINITE, _EXPONENTS, 2 * _EXPONENTS)
    normal = lax.bitcast_convert_type((above << _DROPPED) + shift, jnp.float32)
    small = lax.bitcast_convert_type(above + _STEPS_BITS, jnp.float32) - _STEPS
    magnitude = lax.bitcast_convert_type(jnp.where(above < _NORMAL, small, normal), jnp.int32)
    return lax.bitcast_convert_type(magnitude | ((code & _SIGN) << 20), jnp.float32)
