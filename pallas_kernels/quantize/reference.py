"""The definitions of quantisation. Every other file in this folder must agree with them.

Scales agree to the last bit wherever they are computed. Values are `E4M3(x * (1 / scale))`, rounded to
nearest, ties to even; nothing is clipped. Where the input is not finite the result is NaN; what then becomes
of the rest of its tile is not defined, that of other tiles is not touched.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels.scaled import E4M3, LARGEST, Scale, Scaled, amax, dequantize, exact, power_of_two, spread

TILE = 128
E5M6_LARGEST = 2.0**15  # the magnitude that a packed tile's largest may reach; the format ends at 65024
LEAST_NORMAL = 2.0**-14  # of E5M6


def quantize(x: Float[Array, "*g M K"], tile: tuple[int, int] = (1, TILE), scale: Scale = exact) -> Scaled:
    """E4M3 with a scale for each tile of rows and columns, from the largest magnitude in it."""
    wide = x.astype(jnp.float32)
    scales = scale(amax(wide, tile))
    return Scaled((wide * spread(1 / scales, tile, x.shape)).astype(E4M3), scales, tile)


def transposed(x: Float[Array, "M K"] | Scaled, tile: int = TILE, scale: Scale = exact) -> Scaled:
    """[K, M] with a scale for each row and `tile` columns: the form in which tokens are summed over.

    FP8 rows are read, multiplied by their scales and quantised again along the other axis.
    """
    wide = dequantize(x) if isinstance(x, Scaled) else x
    return quantize(wide.mT, (1, tile), scale)


def swiglu(
    hidden: Float[Array, "M 2F"] | Scaled, weights: Float[Array, " M"] | None, scale: Scale = exact
) -> Scaled:
    """silu(gate) * up * weight, of gate columns and then those of up, quantised by row and 128 columns.

    All in FP32; nothing is rounded before the values are.
    """
    return quantize(_activation(hidden, weights), (1, TILE), scale)


def swiglu_transposed(
    hidden: Float[Array, "M 2F"] | Scaled, weights: Float[Array, " M"] | None, scale: Scale = exact
) -> Scaled:
    """The same activation as [F, M], quantised along tokens, for the gradient of the next weight."""
    return transposed(_activation(hidden, weights), scale=scale)


def swiglu_backward(
    hidden: Float[Array, "M 2F"] | Scaled, weights: Float[Array, " M"] | None, g: Float[Array, "M F"]
) -> tuple[Float[Array, "M 2F"], Float32[Array, " M"] | None]:
    """The cotangents of `hidden`, in the type of `g`, and of `weights`, from that of the activation."""
    gate, up = jnp.split(_wide(hidden), 2, axis=-1)
    weight = None if weights is None else weights.astype(jnp.float32)[:, None]
    *dhidden, dweight = swiglu_gradients(gate, up, g.astype(jnp.float32), weight, jax.nn.sigmoid(gate))
    dhidden = jnp.concatenate(dhidden, axis=-1).astype(g.dtype)
    return dhidden, None if weights is None else jnp.sum(dweight, axis=-1)


def swiglu_gradients(
    gate: Float32[Array, "M F"],
    up: Float32[Array, "M F"],
    g: Float32[Array, "M F"],
    weight: Float32[Array, "M one"] | Float32[Array, "M F"] | None,
    sigmoid: Float32[Array, "M F"],
) -> tuple[Float32[Array, "M F"], Float32[Array, "M F"], Float32[Array, "M F"]]:
    """Of gate and up, and what a row's sum of is that of its weight; `sigmoid` is that of gate."""
    silu = gate * sigmoid
    scaled = g if weight is None else g * weight
    return scaled * up * (sigmoid + silu * (1 - sigmoid)), scaled * silu, g * silu * up


def pack(x: Float[Array, "M K"]) -> tuple[UInt8[Array, "M 3 K/2"], Float32[Array, "M KT"]]:
    """12 bits a value: sign, 5 bits of exponent, 6 of mantissa (E5M6), and a power of two for each 1 x 128.

    The report names the format and not its layout (section 3.3.3). Here column j of the first half and column
    j of the second share three bytes: the low 8 bits of the first; its high 4 below the low 4 of the second;
    the high 8 of the second. So no implementation has to move bits between neighbouring columns.
    Rounded to nearest, ties to even. K must be even.
    """
    wide = x.astype(jnp.float32)
    scales = e5m6_scale(amax(wide, (1, TILE)))
    rounded = _round_to_e5m6(wide * spread(1 / scales, (1, TILE), x.shape))
    codes = jax.lax.bitcast_convert_type(rounded.astype(jnp.float16), jnp.uint16) >> 4
    a, b = jnp.split(codes, 2, axis=-1)
    planes = (a & 0xFF, (a >> 8) | ((b & 0xF) << 4), b >> 4)
    return jnp.stack(planes, axis=1).astype(jnp.uint8), scales


def unpack(bits: UInt8[Array, "M 3 K/2"], scales: Float32[Array, "M KT"]) -> Float[Array, "M K"]:
    """The packed numbers in BF16, which holds them exactly."""
    low, middle, high = (bits[:, i].astype(jnp.uint16) for i in range(3))
    codes = jnp.concatenate([low | ((middle & 0xF) << 8), (middle >> 4) | (high << 4)], axis=-1)
    values = jax.lax.bitcast_convert_type(codes << 4, jnp.float16).astype(jnp.float32)
    return (values * spread(scales, (1, TILE), values.shape)).astype(jnp.bfloat16)


def e5m6_scale(amax: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
    """The least power of two that takes the largest magnitude of a tile to 2^15 or below."""
    return power_of_two(amax * (LARGEST / E5M6_LARGEST))


def _wide(x: Array | Scaled) -> Float32[Array, "M K"]:
    return dequantize(x) if isinstance(x, Scaled) else x.astype(jnp.float32)


def _activation(hidden: Array | Scaled, weights: Array | None) -> Float32[Array, "M F"]:
    gate, up = jnp.split(_wide(hidden), 2, axis=-1)
    y = jax.nn.silu(gate) * up
    return y if weights is None else y * weights.astype(jnp.float32)[:, None]


def _round_to_e5m6(x: Float32[Array, "M K"]) -> Float32[Array, "M K"]:
    """6 bits of mantissa down to 2^-14, and steps of 2^-20 below."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + 0xFFFF + ((bits >> 17) & 1)) & jnp.uint32(0xFFFE0000)
    normal = jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(rounded, jnp.float32), x)
    return jnp.where(jnp.abs(x) < LEAST_NORMAL, jnp.round(x * 2.0**20) * 2.0**-20, normal)
