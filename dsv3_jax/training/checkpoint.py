"""The checkpoints of a run: digested, saved in the background by Orbax, resumed from the newest sound one."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.options import AsyncOptions

from dsv3_jax.training import manifest
from dsv3_jax.training.fingerprint import as_hex, fingerprint
from dsv3_jax.training.manifest import META, MODEL, TRAINING, Leaf, Meta
from dsv3_jax.training.restore import CheckpointError, load_items, newest, steps

TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a step until it is complete


class Restored(NamedTuple):
    """A step that verified."""

    weights: Any
    rest: Any
    meta: Meta


class Checkpoints:
    """The checkpoints of one run, in one directory that belongs to it.

    All processes construct it and call its methods together. Foreign files in the directory are left alone.
    """

    def __init__(
        self, directory: Path | str, *, keep: int, config: dict[str, Any], model_config: dict[str, Any]
    ):
        """Makes the directory if necessary and removes what interrupted saves have left in it.

        Args:
            keep: how many complete steps stay; while a save is under way there is one more.
            config: the resolved configuration, stored with every step.
            model_config: its part that a checkpoint must agree with to be resumed from.
        """
        if keep < 1:
            raise ValueError(
                f"config.checkpoint.keep={keep} would delete every checkpoint: set it to 1 or more."
            )
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._config = config
        self._model_config = model_config
        self._sound: int | None = None  # the last step that this object saved or restored
        self._under_way: tuple[int, Future[None]] | None = None
        self._directory.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        # Made in the background, a directory that cannot be made leaves Orbax's threads waiting for it for
        # twenty minutes, and the process with them.
        at_once = AsyncOptions(create_directories_asynchronously=False)
        self._writer = ocp.AsyncCheckpointer(item_handlers(MODEL, TRAINING), async_options=at_once)

    def __enter__(self) -> "Checkpoints":
        """The object itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the last save."""
        self.close()

    def save(self, step: int, weights: Any, rest: Any, data: dict[str, Any]) -> None:
        """Starts saving a step, if it is not saved yet, and returns once the arrays may be donated.

        Args:
            weights: the tree that inference needs.
            rest: the tree of all other state.
            data: the loader's position by shard; each process gives its own shards.

        Raises:
            CheckpointError: if the save before this one failed; then this one has not begun.
            ValueError: if the directory has this step from elsewhere.
        """
        self.wait()
        if step == self._sound:
            return
        target = self._directory / str(step)
        if target.exists():
            raise ValueError(
                f"{target} exists but this run neither saved nor restored it: choose another --workdir."
            )
        items = {MODEL: manifest.flatten(weights), TRAINING: manifest.flatten(rest)}
        meta = Meta(
            step=step,
            config=self._config,
            model_config=self._model_config,
            data=_union(data),
            versions=manifest.versions(),
            arrays={item: _describe(leaves) for item, leaves in items.items()},
        )
        filled = {item: _with_elements(leaves) for item, leaves in items.items()}
        trees = {item: ocp.args.PyTreeSave(leaves) for item, leaves in filled.items() if leaves}
        try:
            self._writer.save(
                target, ocp.args.Composite(**trees, **{META: ocp.args.JsonSave(meta.to_json())})
            )
        except (OSError, ValueError) as error:
            raise self._failure(step, error) from error
        self._under_way = step, self._worker.submit(self._complete)

    def check_errors(self) -> None:
        """Raises CheckpointError if a save failed since the last call; never waits, so call it often."""
        if self._under_way is not None and self._under_way[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk, or raises CheckpointError if it is not."""
        if self._under_way is None:
            return
        step, future = self._under_way
        self._under_way = None
        try:
            future.result()
        except Exception as error:
            raise self._failure(step, error) from error
        self._sound = step

    def close(self) -> None:
        """Waits like `wait` and ends the threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._writer.close()

    def restore_newest(self, weights: Any, rest: Any) -> Restored | None:
        """The newest step that verifies, on the mesh that is set, or None if nothing was ever saved.

        Steps that do not verify are named in a warning; once an older one is chosen they are renamed to
        `<step>.damaged`, out of the way of the steps to come.

        Args:
            weights: abstract arrays (`jax.eval_shape` of the initialisation) with their shardings.

        Raises:
            CheckpointError: if steps exist and none verifies.
            ValueError: if the checkpoint is of another model, or its arrays differ; the message names which.
        """
        self.wait()
        wanted = {MODEL: weights, TRAINING: rest}
        load = partial(load_items, wanted=wanted, model_config=self._model_config)
        found = newest(lambda: steps(self._directory), load, self._directory)
        if found is None:
            return None
        meta, trees = found
        self._set_aside(meta.step)
        self._sound = meta.step
        weights, rest = trees
        return Restored(weights, rest, meta)

    def _complete(self) -> None:
        """In the background: waits for the commit, then deletes steps beyond `keep`."""
        self._writer.wait_until_finished()
        if jax.process_index() == 0:
            for step in sorted(steps(self._directory))[: -self._keep]:
                _delete(self._directory / str(step))

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """Frees the space of a failed save, which would otherwise stay full, and says what happened."""
        try:
            self._clean()
            good = max(steps(self._directory), default=None)
            free = shutil.disk_usage(self._directory).free
            state = f"There are {free} bytes free; the newest complete step is {good}."
        except OSError as trouble:
            state = f"The directory itself cannot be read: {trouble}."
        return CheckpointError(f"Saving step {step} to {self._directory} failed: {error} {state}")

    def _clean(self) -> None:
        if jax.process_index() == 0:
            for path in self._directory.glob(f"*{TEMPORARY}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, chosen: int) -> None:
        if jax.process_index() == 0:
            for step in steps(self._directory):
                if step > chosen:
                    aside = self._directory / f"{step}.damaged"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(self._directory / str(step), aside)
        _barrier("checkpoints_set_aside")


def item_handlers(*items: str) -> ocp.CompositeCheckpointHandler:
    """One zarr3 directory per array, so that readers and converters need nothing but tensorstore."""
    logging.getLogger("absl").addFilter(_no_merge_warning)
    handlers: dict[str, Any] = {META: ocp.JsonCheckpointHandler()}
    for item in items:
        handlers[item] = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    return ocp.CompositeCheckpointHandler(**handlers)


def _describe(leaves: Mapping[str, Any]) -> dict[str, Leaf]:
    words = fingerprint(dict(leaves))
    return {
        name: Leaf(shape=tuple(x.shape), dtype=str(x.dtype), digest=as_hex(words[name]))
        for name, x in leaves.items()
    }


def _with_elements(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Orbax refuses arrays of size zero, and items of nothing else; the record says it all."""
    return {name: x for name, x in leaves.items() if x.size}


def _no_merge_warning(record: logging.LogRecord) -> bool:
    """Orbax warns at every save that it has no OCDBT files to merge, which is what was asked for."""
    return "Skipping merge of OCDBT" not in str(record.msg)


def _delete(step_directory: Path) -> None:
    """Renames first: a half deleted step must not look like a step."""
    doomed = step_directory.with_name(f"{step_directory.name}{TEMPORARY}-deleted")
    os.rename(step_directory, doomed)
    shutil.rmtree(doomed)


def _union(data: dict[str, Any]) -> dict[str, Any]:
    """All processes' shards of the loader's position."""
    if jax.process_count() == 1:
        return data
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return {k: v for row, n in zip(rows, lengths, strict=True) for k, v in json.loads(bytes(row[:n])).items()}


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
