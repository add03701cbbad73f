"""Writes tensors that arrive in bands into safetensors shards of a bounded size, with the index over them."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from dsv3_jax.interop.safetensors import INDEX, TYPES


class Slot(NamedTuple):
    """A tensor that will come."""

    name: str
    dtype: str  # a key of TYPES
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * TYPES[self.dtype].itemsize


def named(slots: Sequence[Slot], max_shard_size: int) -> dict[str, list[Slot]]:
    """The files `model-*-of-*.safetensors` with the tensors of each.

    Args:
        max_shard_size: bytes of tensors in a file; a single tensor larger than that has a file of its own.
    """
    shards = split(slots, max_shard_size)
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def write_index(directory: Path, files: Mapping[str, Sequence[Slot]]) -> None:
    """Writes the index over all files."""
    index = {
        "metadata": {"total_size": sum(s.size for shard in files.values() for s in shard)},
        "weight_map": {s.name: name for name, shard in files.items() for s in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def split(slots: Iterable[Slot], max_shard_size: int) -> list[list[Slot]]:
    """Consecutive tensors, as many as fit each file."""
    shards: list[list[Slot]] = []
    room = 0
    for slot in slots:
        if not shards or slot.size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(slot)
        room -= slot.size
    return shards


def write(path: Path, slots: Sequence[Slot], bands: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes one file, durably.

    Args:
        bands: the name of a tensor with its next rows; all rows of all slots, in the order of the slots.
    """
    starts = _starts(slots)
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            **{
                s.name: {
                    "dtype": s.dtype,
                    "shape": list(s.shape),
                    "data_offsets": [starts[s.name], starts[s.name] + s.size],
                }
                for s in sorted(slots, key=lambda s: starts[s.name])
            },
        },
        separators=(",", ":"),
    ).encode("utf-8")
    header += b" " * (-len(header) % 8)
    source = iter(bands)
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for slot in slots:
            f.seek(8 + len(header) + starts[slot.name])
            _fill(f, slot, source)
        f.flush()
        os.fsync(f.fileno())
    assert next(source, None) is None, "More bands came than there are tensors."


def _starts(slots: Sequence[Slot]) -> dict[str, int]:
    """Where each tensor's bytes begin: wide types first, so that all are aligned, which PyTorch needs."""
    starts, at = {}, 0
    for slot in sorted(slots, key=lambda s: -TYPES[s.dtype].itemsize):
        starts[slot.name] = at
        at += slot.size
    return starts


def _fill(file: IO[bytes], slot: Slot, bands: Iterator[tuple[str, np.ndarray]]) -> None:
    missing = slot.size
    while missing:
        name, band = next(bands)
        assert name == slot.name and band.dtype == TYPES[slot.dtype] and band.nbytes <= missing, (name, slot)
        file.write(np.ascontiguousarray(band).reshape(-1).view(np.uint8).data)
        missing -= band.nbytes
