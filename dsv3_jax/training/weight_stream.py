"""Weights of a checkpoint written and read piece by piece, so that a converter holds one matrix at a time."""

import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsv3_jax.training import arrays, boxes, manifest
from dsv3_jax.training.checkpoint import TEMPORARY, item_handlers
from dsv3_jax.training.fingerprint import as_hex, check_type, fingerprint_slice
from dsv3_jax.training.manifest import META, META_FILE, MODEL, Damaged, Leaf, Meta
from dsv3_jax.training.restore import locate_newest, steps

_STEP = 0  # converted weights have seen no step of a run
_CHUNK = 64 << 20  # bytes: at most this much of an array shares a file, and is decoded at once


class WeightWriter:
    """Writes `DIR/0` as a run would have; a context manager that commits by one rename.

    If the process dies, or the block raises OSError or is interrupted, what was written stays, and another
    writer of the same weights may `adopt` it. Any other exception leaves nothing. Several threads may write.

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
        self._lock = threading.Lock()
        self._made = [p for p in (self._directory, *self._directory.parents) if not p.exists()]
        self._stage = self._directory / f"{_STEP}{TEMPORARY}-writing"

    def __enter__(self) -> "WeightWriter":
        """Makes the directory; raises FileExistsError if it has checkpoints already."""
        if self._directory.exists() and steps(self._directory):
            raise FileExistsError(f"{self._directory} already holds a checkpoint: choose another directory.")
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            _begin(self._stage, {n: x for n, x in self._leaves.items() if math.prod(x.shape)})
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Commits, after checking that nothing is missing, or removes what was written."""
        self._open.clear()
        if kind is not None and (issubclass(kind, OSError) or not issubclass(kind, Exception)):
            return
        try:
            if kind is None:
                self._commit()
        finally:
            self._abandon()

    def write(self, name: str, index: boxes.Index, block: np.ndarray) -> np.ndarray:
        """Writes a part of one array and adds it to the digest.

        Args:
            name: dotted, as `manifest.flatten` names the leaves.
            index: integers and slices without steps for the leading axes; what is left out is whole.
            block: of exactly the shape and type that the index selects.

        Returns:
            The block's part of the digest, UInt32[2].

        Raises:
            ValueError: if the name is unknown, the shape or type differs, or an element was written before.
        """
        if name not in self._leaves:
            raise ValueError(f"{name} is no array of this model: it has {', '.join(self._leaves)}.")
        leaf = self._leaves[name]
        box = boxes.box(name, index, leaf.shape)
        extents = box[1] - box[0]
        kept = boxes.kept(box, index)
        if list(block.shape) != kept or block.dtype != leaf.dtype:
            raise ValueError(
                f"{name}[{index}] takes {leaf.dtype}{kept} "
                f"but a block of {block.dtype}{list(block.shape)} was given."
            )
        whole = block.reshape(extents)
        with self._lock:
            self._claim(name, box)
            if block.size and name not in self._open:
                self._open[name] = self._array(name, _bounded(tuple(extents.tolist()), whole.itemsize))
        words = np.zeros(2, np.uint32)
        if block.size:
            on_disk = self._open[name][boxes.slices(box)].write(whole)
            words = fingerprint_slice(whole, box[0].tolist())  # while it is being written
            on_disk.result()
        with self._lock:
            self._digests[name] += words
        return words

    def adopt(self, blocks: Iterable[tuple[str, boxes.Index]], digests: Mapping[str, Sequence[int]]) -> bool:
        """Counts blocks as written that an interrupted writer wrote, if they still have these digests.

        Args:
            blocks: names and indices, as for `write`.
            digests: by name, the sum of what `write` returned for its blocks, modulo 2^32.

        Returns:
            Whether they do; if not, they have to be written again.
        """
        found = {name: np.zeros(2, np.uint32) for name in digests}
        selected = [(name, boxes.box(name, index, self._leaves[name].shape)) for name, index in blocks]
        try:
            for name, box in selected:
                if name not in self._open:
                    self._open[name] = arrays.open_array(
                        self._stage / MODEL / name, self._leaf(name), arrays.WRITING
                    )
                block = arrays.read_block(self._open[name], boxes.slices(box), name)
                found[name] += fingerprint_slice(block, box[0].tolist())
        except Damaged:
            return False
        if any(words.tolist() != list(digests[name]) for name, words in found.items()):
            return False
        for name, box in selected:
            self._claim(name, box)
        for name, words in found.items():
            self._digests[name] += words
        return True

    def _claim(self, name: str, box: np.ndarray) -> None:
        """Notes that a box is written, once."""
        before = self._boxes[name]
        if np.any(np.all((before[:, 0] < box[1]) & (box[0] < before[:, 1]), axis=1)):
            raise ValueError(
                f"{name}{boxes.spans(box)} was written before, at least in part: write each element once."
            )
        if np.all(box[0] < box[1]):
            self._boxes[name] = np.concatenate([before, box[None]])

    def _array(self, name: str, chunk: tuple[int, ...]) -> ts.TensorStore:
        """An array that an interrupted writer left, or else a new one."""
        try:
            return arrays.open_array(self._stage / MODEL / name, self._leaf(name), arrays.WRITING)
        except Damaged:
            return arrays.create_array(self._stage / MODEL / name, self._leaf(name), chunk)

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
        self._open: dict[str, ts.TensorStore] = {}
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

    def read(self, name: str, index: boxes.Index) -> np.ndarray:
        """A part of one array, not verified; the index is as for `WeightWriter.write`.

        Raises:
            Damaged: if the file cannot be read.
        """
        leaf = self._leaves[name]
        box = boxes.box(name, index, leaf.shape)
        kept = boxes.kept(box, index)
        if 0 in leaf.shape:
            return np.zeros(kept, self.dtype(name))
        if name not in self._open:
            self._open[name] = arrays.open_array(self._path / MODEL / name, leaf)
        return arrays.read_block(self._open[name], boxes.slices(box), name).reshape(kept)

    def words(self, name: str, index: boxes.Index, block: np.ndarray) -> np.ndarray:
        """The part of an array's digest that a block which was read makes up, UInt32[2]."""
        box = boxes.box(name, index, self.shape(name))
        return fingerprint_slice(block.reshape(box[1] - box[0]), box[0].tolist())

    def verify(self) -> None:
        """Reads everything once, chunk by chunk, and compares the digests.

        Raises:
            Damaged: naming every array that is not what was written.
        """
        self.compare({name: self._digest(name) for name in self._leaves})

    def compare(self, digests: Mapping[str, np.ndarray]) -> None:
        """Compares digests with what was saved.

        Args:
            digests: by name, the sum of `words` over blocks that tile the array.

        Raises:
            Damaged: naming every array that is not what was written.
        """
        wrong = [name for name, leaf in self._leaves.items() if as_hex(digests[name]) != leaf.digest]
        if wrong:
            raise Damaged(f"{self._path}: the digests of {', '.join(wrong)} do not match what was saved.")

    def _digest(self, name: str) -> np.ndarray:
        leaf, total = self._leaves[name], np.zeros(2, np.uint32)
        if 0 not in leaf.shape:
            array = arrays.open_array(self._path / MODEL / name, leaf)
            for box in boxes.tiles(leaf.shape, _unit(array, leaf)):
                total += fingerprint_slice(arrays.read_block(array, boxes.slices(box), name), box[0].tolist())
        return total


def _begin(stage: Path, leaves: dict[str, Any]) -> None:
    """Makes a stage, or goes on in one with the same tree, whose arrays stay until they are overwritten."""
    fresh = stage.with_name(f"{stage.name}-skeleton")
    _write_skeleton(fresh, leaves)
    described = Path(MODEL, "_METADATA")  # by Orbax: the names
    if (stage / described).exists() and (stage / described).read_bytes() == (fresh / described).read_bytes():
        shutil.rmtree(fresh)
        return
    shutil.rmtree(stage, ignore_errors=True)
    os.rename(fresh, stage)


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
