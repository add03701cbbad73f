"""FP8 weights with one scale per block: value = E4M3 * scale (arXiv:2412.19437, section 3.3.2).

The files call the scale `weight_scale_inv`; it multiplies. Blocks at the lower and
right edges may be partial.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32

BLOCK = 128
LARGEST = 448.0  # of E4M3
_LEAST = 1e-4  # below this an amax counts as this, so that a block of zeros has a scale

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

Rounding = Callable[[Float32[np.ndarray, "*s"]], Float32[np.ndarray, "*s"]]


def blocks(rows: int, block: int) -> int:
    """How many blocks cover so many rows or columns."""
    return -(-rows // block)


def dequantise(
    weight: Float[np.ndarray, "O I"],
    scale: Float32[np.ndarray, "OB IB"],
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> Float32[np.ndarray, "O I"]:
    """E4M3 times its block's scale, in FP32."""
    rows, columns = weight.shape
    out = weight.astype(np.float32)
    for i in range(scale.shape[0]):
        out[i * block[0] : (i + 1) * block[0]] *= np.repeat(scale[i], block[1])[:columns]
    assert scale.shape == (blocks(rows, block[0]), blocks(columns, block[1]))
    return out


def quantise(
    weight: Float32[np.ndarray, "O I"], rounding: Rounding
) -> tuple[Float[np.ndarray, "O I"], Float32[np.ndarray, "OB IB"]]:
    """Scales each block so that its largest magnitude becomes 448, and rounds to E4M3.

    The arithmetic is that of DeepGEMM, in FP32 throughout: amax at least 1e-4, scale = rounding(amax / 448),
    value = E4M3(weight * (1 / scale)).

    Args:
        rounding: `as_it_is`, or `to_power_of_two` for UE8M0.
    """
    rows, columns = weight.shape
    out = np.empty(weight.shape, E4M3)
    scale = np.empty((blocks(rows, BLOCK), blocks(columns, BLOCK)), np.float32)
    edges = np.arange(0, columns, BLOCK)
    for i in range(scale.shape[0]):
        band = weight[i * BLOCK : (i + 1) * BLOCK]
        amax = np.maximum.reduceat(np.abs(band).max(axis=0), edges)
        scale[i] = rounding(np.maximum(amax, np.float32(_LEAST)) / np.float32(LARGEST))
        inverse = np.float32(1) / scale[i]
        out[i * BLOCK : (i + 1) * BLOCK] = (band * np.repeat(inverse, BLOCK)[:columns]).astype(E4M3)
    return out, scale


def as_it_is(scale: Float32[np.ndarray, "*s"]) -> Float32[np.ndarray, "*s"]:
    """Any FP32 scale, as in DeepSeek-V3 and R1."""
    return scale


def to_power_of_two(scale: Float32[np.ndarray, "*s"]) -> Float32[np.ndarray, "*s"]:
    """The least power of two not below a positive scale (UE8M0, as in DeepSeek-V3.1); exact, from bits."""
    bits = scale.view(np.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (np.clip(exponent, 1, 254) << 23).astype(np.uint32).view(np.float32)


def usable(scale: Float32[np.ndarray, "*s"]) -> bool:
    """Whether every scale is finite and above zero."""
    return bool(np.all(np.isfinite(scale)) and np.all(scale > 0))
