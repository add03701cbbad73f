"""Writes tensors that arrive in bands into safetensors shards of a bounded size, with the index over them."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


def write(
    directory: Path,
    slots: Sequence[Slot],
    bands: Iterable[tuple[str, np.ndarray]],
    max_shard_size: int,
) -> None:
    """Writes `model-*-of-*.safetensors` and the index.

    Args:
        directory: an existing one that nobody reads yet.
        bands: the name of a tensor with its next rows; all rows of all slots, in the order of the slots.
        max_shard_size: bytes of tensors in a file; a single tensor larger than that has a file of its own.
    """
    shards = split(slots, max_shard_size)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    source = iter(bands)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, source)
    assert next(source, None) is None, "More bands came than there are tensors."
    index = {
        "metadata": {"total_size": sum(s.size for s in slots)},
        "weight_map": {s.name: name for name, shard in zip(names, shards, strict=True) for s in shard},
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


def _write_shard(path: Path, slots: Sequence[Slot], bands: Iterator[tuple[str, np.ndarray]]) -> None:
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
    with path.open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        for slot in slots:
            f.seek(8 + len(header) + starts[slot.name])
            _fill(f, slot, bands)
        f.flush()
        os.fsync(f.fileno())


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


@contextmanager
def staged(directory: Path | str) -> Iterator[Path]:
    """A temporary folder that becomes `directory` when the block ends, or vanishes if it fails.

    Raises:
        FileExistsError: if the directory exists and is not empty.
    """
    target = Path(directory).absolute()
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty: choose another destination or remove it.")
    with ExitStack() as undo:
        for parent in [p for p in (target.parent, *target.parent.parents) if not p.exists()][::-1]:
            parent.mkdir()
            undo.callback(parent.rmdir)
        stage = target.with_name(f".{target.name}.partial-{os.getpid()}")
        stage.mkdir()
        undo.callback(_remove, stage)
        yield stage
        os.rename(stage, target)
        undo.pop_all()


def _remove(directory: Path) -> None:
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    directory.rmdir()
