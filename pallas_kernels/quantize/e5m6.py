"""Codes of 12 bits (E5M6) as integers, and how two of them are three bytes, for kernels.

The exponent of FP32 less 112 is that of E5M6. The definition goes through FP16, which vectors of TPUs lack.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_kernels.quantize.reference import LEAST_NORMAL

_DROPPED = 17  # bits of FP32's mantissa that E5M6 lacks
_EXPONENTS = 112 << 23  # between the exponents of FP32 and those of E5M6, in bits of FP32
_SIGN, _NAN, _INFINITE, _NORMAL = 0x800, 0x7E0, 0x7C0, 0x40
_STEPS = 8.0  # FP32 numbers from here on are as far apart as E5M6's below the least normal one: 2^-20
_STEPS_BITS = 0x41000000


def to_bytes(a: Int32[Array, "R C"], b: Int32[Array, "R C"]) -> tuple[Int32[Array, "R C"], ...]:
    """Three bytes of each code of the first half of a row with that of the second, as in the definition."""
    return a & 0xFF, (a >> 8) | ((b & 0xF) << 4), b >> 4


def from_bytes(
    low: Int32[Array, "R C"], middle: Int32[Array, "R C"], high: Int32[Array, "R C"]
) -> tuple[Int32[Array, "R C"], Int32[Array, "R C"]]:
    """The codes of both halves."""
    return low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)


def code(x: Float32[Array, "R C"]) -> Int32[Array, "R C"]:
    """Of the nearest number, ties to even; magnitudes are 2^15 at most, or not finite, which becomes NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = jnp.abs(x)
    above = bits & 0x7FFFFFFF
    normal = (above + (0xFFFF - _EXPONENTS) + ((bits >> _DROPPED) & 1)) >> _DROPPED
    small = lax.bitcast_convert_type(magnitude + _STEPS, jnp.int32) - _STEPS_BITS
    code = jnp.minimum(jnp.where(magnitude < LEAST_NORMAL, small, normal), _NAN)
    return code | ((bits >> 20) & _SIGN)


def value(code: Int32[Array, "R C"]) -> Float32[Array, "R C"]:
    """The number of a code."""
    above = code & (_SIGN - 1)
    shift = jnp.where(above < _INFINITE, _EXPONENTS, 2 * _EXPONENTS)
    normal = lax.bitcast_convert_type((above << _DROPPED) + shift, jnp.float32)
    small = lax.bitcast_convert_type(above + _STEPS_BITS, jnp.float32) - _STEPS
    magnitude = lax.bitcast_convert_type(jnp.where(above < _NORMAL, small, normal), jnp.int32)
    return lax.bitcast_convert_type(magnitude | ((code & _SIGN) << 20), jnp.float32)
