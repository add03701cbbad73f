"""Digests of arrays that are equal on every mesh and on disk, and that any one changed element changes.

Every element is scrambled together with its coordinates and the results are added modulo 2^32, twice with
different constants. The scrambling is a bijection of the element, so a change of exactly one element always
changes both words; other changes escape with a chance of about 2^-64. Addition has no order, so a device, a
mesh or a file can be digested piece by piece where it lies. It finds accidents; it is no defence against
somebody who wants to deceive.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

_Bits = TypeVar("_Bits", jax.Array, np.ndarray)

_BLOCK = 1 << 15  # elements a numpy pass works on: with its temporaries they stay in a core's cache
_DIMS = 16

# Four-bit types are missing on purpose: numpy keeps one in a byte, so device and disk would disagree.
_WHOLE_BYTES = frozenset(
    "bool int8 uint8 int16 uint16 int32 uint32 float8_e4m3fn float8_e5m2 float16 bfloat16 float32".split()
)


def fingerprint(tree: Any, first: int = 0) -> Any:
    """Two words per array of a tree, computed where the arrays lie; only the words travel to the host.

    Needs no memory beyond the arrays. Every process of a run must call it, and each gets the same answer.

    Args:
        tree: arrays, or rows of larger ones.
        first: the number of the first row in the larger arrays; see `fingerprint_slice`.

    Returns:
        The tree with every leaf replaced by a numpy uint32[2].

    Raises:
        TypeError: if a leaf has a type without a fixed whole number of bytes up to four.
    """
    for leaf in jax.tree.leaves(tree):
        check_type(leaf.dtype)
    return jax.tree.map(np.asarray, _fingerprint(tree, np.uint32(first)))


def fingerprint_slice(part: np.ndarray, start: Sequence[int]) -> UInt32[np.ndarray, "2"]:
    """What a block of a larger array adds to the fingerprint of the whole.

    Args:
        part: the block, of the whole array's rank.
        start: coordinates of its first element in the whole.

    Returns:
        The block's words: summed over blocks that tile an array, modulo 2^32, they are the array's.
    """
    check_type(part.dtype)
    if part.ndim != len(start):
        raise ValueError(
            f"A block of rank {part.ndim} cannot start at the {len(start)} coordinates {tuple(start)}: "
            "give one per axis."
        )
    if part.ndim == 0:
        part, start = part.reshape(1), (0,)
    return _blocks(part.view(f"u{part.dtype.itemsize}"), tuple(start), np.zeros(2, np.uint32), 0)


def check_type(dtype: Any) -> None:
    """Refuses an array type that cannot be digested."""
    if str(dtype) not in _WHOLE_BYTES:
        raise TypeError(
            f"An array of {dtype} cannot be fingerprinted: only {', '.join(sorted(_WHOLE_BYTES))} can, "
            "so store its bits as one of them."
        )


def as_hex(words: UInt32[np.ndarray, "2"]) -> str:
    """A fingerprint as sixteen hexadecimal digits."""
    return f"{int(words[0]):08x}{int(words[1]):08x}"


@jax.jit
def _fingerprint(tree: Any, first: jax.Array) -> Any:
    return jax.tree.map(functools.partial(_one, first=first), tree)


def _one(x: jax.Array, first: jax.Array) -> UInt32[jax.Array, "2"]:
    if x.size == 0:
        return jnp.zeros(2, jnp.uint32)
    x = x.reshape(1) if x.ndim == 0 else x
    sharding = jax.typeof(x).sharding
    where = None if sharding.mesh.empty else sharding
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, x.shape, out_sharding=where)
    a, b = _keys([iota(0) + first, *(iota(d) for d in range(1, x.ndim))], 0)
    zero = jnp.uint32(0)
    # One reduction of a pair: with two, XLA writes the scrambled elements to memory for the second.
    return jnp.stack(
        jax.lax.reduce(
            _scramble(_unsigned(x), a, b),
            (zero, zero),
            lambda p, q: (p[0] + q[0], p[1] + q[1]),
            tuple(range(x.ndim)),
        )
    )


def _unsigned(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = jnp.dtype(f"u{x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _blocks(bits: np.ndarray, start: tuple[int, ...], key: np.ndarray, axis: int) -> np.ndarray:
    """Splits along the first axis until a block fits, carrying the part of the key that is already fixed."""
    total = np.zeros(2, np.uint32)
    if bits.size == 0:
        return total
    row = bits.size // bits.shape[0]
    step = max(1, _BLOCK // row)
    for i in range(0, bits.shape[0], step):
        if row > _BLOCK:
            fixed = np.concatenate(_keys([np.array([start[0] + i], np.uint32)], axis))
            total += _blocks(bits[i], start[1:], key + fixed, axis + 1)
        else:
            total += _block(bits[i : i + step], (start[0] + i, *start[1:]), key, axis)
    return total


def _block(bits: np.ndarray, start: tuple[int, ...], key: np.ndarray, axis: int) -> np.ndarray:
    """The words of one block that fits in the cache."""
    along = [np.arange(s, s + n, dtype=np.uint32) for s, n in zip(start, bits.shape, strict=True)]
    grid = [c.reshape((-1,) + (1,) * (bits.ndim - d - 1)) for d, c in enumerate(along)]
    a, b = _keys(grid, axis)
    words = _scramble(bits.astype(np.uint32), a + key[0], b + key[1])
    return np.stack([w.sum(dtype=np.uint32) for w in words])


def _keys(coordinates: Sequence[_Bits], axis: int) -> tuple[Any, Any]:
    """Two hashes of an element's coordinates, linear so that blocks can share the part that is constant.

    Hashing coordinates, not the flat index, lets an array have more than 2^32 elements.
    """
    a = b = 0
    for d, c in enumerate(coordinates):
        first, second = _multipliers()[axis + d]
        a, b = c * first + a, c * second + b
    return a, b


def _scramble(x: Any, a: Any, b: Any) -> tuple[Any, Any]:
    """Two avalanching bijections of a word, chosen by the keys."""
    return _avalanche(x ^ a), _avalanche((x + b) ^ np.uint32(0x9E3779B1))


def _avalanche(x: Any) -> Any:
    """Every input bit reaches every output bit (the constants are those of the published lowbias32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


@functools.cache
def _multipliers() -> tuple[tuple[np.uint32, np.uint32], ...]:
    """Odd, unrelated numbers per axis."""
    seeds = _avalanche(np.arange(1, 2 * _DIMS + 1, dtype=np.uint32) * np.uint32(0x9E3779B1)) | np.uint32(1)
    return tuple((seeds[2 * d], seeds[2 * d + 1]) for d in range(_DIMS))
