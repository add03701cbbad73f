"""Boxes: the part of an array that an index selects, as its first element and its end along each axis."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

Index = tuple[int | slice, ...]


def box(name: str, index: Index, shape: Sequence[int]) -> np.ndarray:
    """First element and end along each axis, [2, rank]."""
    if len(index) > len(shape):
        raise ValueError(f"{name} has {len(shape)} axes but {len(index)} indices were given.")
    full = (*index, *(slice(None),) * (len(shape) - len(index)))
    spans = []
    for i, n in zip(full, shape, strict=True):
        start, stop, step = i.indices(n) if isinstance(i, slice) else (i, i + 1, 1)
        if step != 1 or not 0 <= start <= stop <= n:
            raise ValueError(
                f"The index {index} does not select a block of {name}, whose shape is {list(shape)}."
            )
        spans.append((start, stop))
    return np.array(spans, np.int64).reshape(-1, 2).T


def kept(box: np.ndarray, index: Index) -> list[int]:
    """The shape of what an index selects: integers drop their axes."""
    extents = enumerate((box[1] - box[0]).tolist())
    return [n for i, n in extents if i >= len(index) or isinstance(index[i], slice)]


def slices(box: np.ndarray) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(int(a), int(b)) for a, b in box.T)


def spans(box: np.ndarray) -> str:
    """A box in words."""
    return "[" + ", ".join(f"{a}:{b}" for a, b in box.T) + "]"


def tiles(shape: tuple[int, ...], unit: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Boxes of a size that cover an array."""
    for corner in itertools.product(*(range(0, n, u) for n, u in zip(shape, unit, strict=True))):
        ends = [min(c + u, n) for c, u, n in zip(corner, unit, shape, strict=True)]
        yield np.array([corner, ends], np.int64).reshape(2, -1)
