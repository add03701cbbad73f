"""Weights of a checkpoint written and read piece by piece, so that a converter holds one matrix at a time."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsv3_jax.training import arrays, manifest
from dsv3_jax.training.checkpoint import TEMPORARY, item_handlers
from dsv3_jax.training.fingerprint import as_hex, check_type, fingerprint_slice
from dsv3_jax.training.manifest import META, META_FILE, MODEL, Damaged, Leaf, Meta
from dsv3_jax.training.restore import locate_newest, steps

_STEP = 0  # converted weights have seen no step of a run
_CHUNK = 64 << 20  # bytes: at most this much of an array shares a file, and is decoded at once

_Index = tuple[int | slice, ...]


class WeightWriter:
    """Writes `DIR/0` as a run would have; a context manager that commits by one rename, or leaves nothing.

    Every element has to be written exactly once. A chunk on disk has the extents of an array's first
    block, so blocks of one size, aligned with each other, are the fast way to write.
    """

    def __init__(
        self, directory: Path | str, weights: Any, *, config: dict[str, Any], model_config: dict[str, Any]
    ):
        """Writes nothing yet.

        Args:
            weights: the abstract tree that `load_weights` will be asked for; shardings play no part.
            config: how the weights were made, for the record.
            model_config: the model they belong to.
        """
        self._directory = Path(directory).absolute()
        self._leaves = manifest.flatten(weights)
        for leaf in self._leaves.values():
            check_type(leaf.dtype)
        self._config, self._model_config = config, model_config
        self._digests = {name: np.zeros(2, np.uint32) for name in self._leaves}
        self._boxes = {name: np.zeros((0, 2, len(x.shape)), np.int64) for name, x in self._leaves.items()}
        self._open: dict[str, ts.TensorStore] = {}
        self._made = [p for p in (self._directory, *self._directory.parents) if not p.exists()]
        self._stage = self._directory / f"{_STEP}{TEMPORARY}-writing"

    def __enter__(self) -> "WeightWriter":
        """Makes the directory; raises FileExistsError if it has checkpoints already."""
        if self._directory.exists() and steps(self._directory):
            raise FileExistsError(f"{self._directory} already holds a checkpoint: choose another directory.")
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            shutil.rmtree(self._stage, ignore_errors=True)
            _write_skeleton(self._stage, {n: x for n, x in self._leaves.items() if math.prod(x.shape)})
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Commits, after checking that nothing is missing, or removes what was written."""
        self._open.clear()
        try:
            if kind is None:
                self._commit()
        finally:
            self._abandon()

    def write(self, name: str, index: _Index, block: np.ndarray) -> None:
        """Writes a part of one array and adds it to the digest.

        Args:
            name: dotted, as `manifest.flatten` names the leaves.
            index: integers and slices without steps for the leading axes; what is left out is whole.
            block: of exactly the shape and type that the index selects.

        Raises:
            ValueError: if the name is unknown, the shape or type differs, or an element was written before.
        """
        if name not in self._leaves:
            raise ValueError(f"{name} is no array of this model: it has {', '.join(self._leaves)}.")
        leaf = self._leaves[name]
        box = _box(name, index, leaf.shape)
        extents = box[1] - box[0]
        kept = [int(n) for i, n in enumerate(extents) if i >= len(index) or isinstance(index[i], slice)]
        if list(block.shape) != kept or block.dtype != leaf.dtype:
            raise ValueError(
                f"{name}[{index}] takes {leaf.dtype}{kept} "
                f"but a block of {block.dtype}{list(block.shape)} was given."
            )
        before = self._boxes[name]
        if np.any(np.all((before[:, 0] < box[1]) & (box[0] < before[:, 1]), axis=1)):
            raise ValueError(
                f"{name}{_spans(box)} was written before, at least in part: write each element once."
            )
        if block.size == 0:
            return
        whole = block.reshape(extents)
        if name not in self._open:
            chunk = _bounded(tuple(map(int, extents)), whole.itemsize)
            self._open[name] = arrays.create_array(self._stage / MODEL / name, self._leaf(name), chunk)
        on_disk = self._open[name][_slices(box)].write(whole)
        self._digests[name] += fingerprint_slice(whole, box[0].tolist())  # while it is being written
        on_disk.result()
        self._boxes[name] = np.concatenate([before, box[None]])

    def _leaf(self, name: str) -> Leaf:
        x = self._leaves[name]
        return Leaf(shape=tuple(x.shape), dtype=str(jnp.dtype(x.dtype)), digest=as_hex(self._digests[name]))

    def _commit(self) -> None:
        written = {name: np.prod(box[:, 1] - box[:, 0], axis=1).sum() for name, box in self._boxes.items()}
        wrong = [
            f"{name} has {math.prod(x.shape)} elements but {written[name]} were written."
            for name, x in self._leaves.items()
            if written[name] != math.prod(x.shape)
        ]
        if wrong:
            raise ValueError(
                f"The weights for {self._directory} are incomplete: {' '.join(wrong)} Write all of them."
            )
        meta = Meta(
            step=_STEP,
            config=self._config,
            model_config=self._model_config,
            data={},
            versions=manifest.versions(),
            arrays={MODEL: {name: self._leaf(name) for name in self._leaves}},
        )
        (self._stage / META / META_FILE).write_text(json.dumps(meta.to_json()), encoding="utf-8")
        os.rename(self._stage, self._directory / str(_STEP))

    def _abandon(self) -> None:
        """Removes what was not committed, and the directories made for it if they are empty."""
        shutil.rmtree(self._stage, ignore_errors=True)
        for path in self._made:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


class WeightReader:
    """Reads the weights of a checkpoint block by block; see `load_weights` for what the directory may be."""

    def __init__(self, directory: Path | str):
        """Takes the newest step with an intact record. Its arrays are not verified yet: call `verify`.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            CheckpointError: if none can be read.
        """
        self._path, self.meta = locate_newest(directory)
        self._leaves = self.meta.arrays[MODEL]
        if any(0 not in leaf.shape for leaf in self._leaves.values()):
            arrays.refuse_links(self._path / MODEL)

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted names of the arrays."""
        return tuple(self._leaves)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one array."""
        return self._leaves[name].shape

    def dtype(self, name: str) -> np.dtype:
        """The type of one array."""
        return jnp.dtype(self._leaves[name].dtype)

    def read(self, name: str, index: _Index) -> np.ndarray:
        """A part of one array, not verified; the index is as for `WeightWriter.write`.

        Raises:
            Damaged: if the file cannot be read.
        """
        leaf = self._leaves[name]
        box = _box(name, index, leaf.shape)
        kept = [
            int(n) for i, n in enumerate(box[1] - box[0]) if i >= len(index) or isinstance(index[i], slice)
        ]
        if 0 in leaf.shape:
            return np.zeros(kept, self.dtype(name))
        array = arrays.open_array(self._path / MODEL / name, leaf)
        return arrays.read_block(array, _slices(box), name).reshape(kept)

    def verify(self) -> None:
        """Reads everything once, chunk by chunk, and compares the digests.

        Raises:
            Damaged: naming every array that is not what was written.
        """
        wrong = [name for name in self._leaves if self._digest(name) != self._leaves[name].digest]
        if wrong:
            raise Damaged(f"{self._path}: the digests of {', '.join(wrong)} do not match what was saved.")

    def _digest(self, name: str) -> str:
        leaf, total = self._leaves[name], np.zeros(2, np.uint32)
        if 0 not in leaf.shape:
            array = arrays.open_array(self._path / MODEL / name, leaf)
            for box in _tiles(leaf.shape, _unit(array, leaf)):
                total += fingerprint_slice(arrays.read_block(array, _slices(box), name), box[0].tolist())
        return as_hex(total)


def _write_skeleton(stage: Path, leaves: dict[str, Any]) -> None:
    """Lets Orbax describe the tree in its own files, with arrays of one element, then drops those arrays."""
    tiny = {name: np.zeros((1,) * len(x.shape), x.dtype) for name, x in leaves.items()}
    with ocp.Checkpointer(item_handlers(MODEL)) as writer:
        writer.save(
            stage,
            ocp.args.Composite(**{MODEL: ocp.args.PyTreeSave(tiny), META: ocp.args.JsonSave({})}),
            force=True,
        )
    for name in tiny:
        shutil.rmtree(stage / MODEL / name)


def _box(name: str, index: _Index, shape: Sequence[int]) -> np.ndarray:
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


def _slices(box: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in box.T)


def _spans(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in box.T) + "]"


def _bounded(extents: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The largest block of an array's leading axes' order that stays below the chunk size."""
    chunk = list(extents)
    for axis in range(len(chunk)):
        rest = math.prod(chunk[axis + 1 :]) * itemsize
        chunk[axis] = max(1, min(chunk[axis], _CHUNK // rest))
    return tuple(chunk)


def _unit(array: ts.TensorStore, leaf: Leaf) -> tuple[int, ...]:
    """What to read at once: everything if it is little, else what the file decodes at once."""
    chunk = array.chunk_layout.read_chunk.shape
    if math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize <= _CHUNK or chunk is None:
        return leaf.shape
    return tuple(c or n for c, n in zip(chunk, leaf.shape, strict=True))


def _tiles(shape: tuple[int, ...], unit: tuple[int, ...]) -> Iterator[np.ndarray]:
    for corner in itertools.product(*(range(0, n, u) for n, u in zip(shape, unit, strict=True))):
        ends = [min(c + u, n) for c, u, n in zip(corner, unit, shape, strict=True)]
        yield np.array([corner, ends], np.int64).reshape(2, -1)
