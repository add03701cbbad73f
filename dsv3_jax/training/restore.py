"""Restoring: the newest step that verifies, its record and its arrays, whatever happened to the others."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.training import arrays, manifest
from dsv3_jax.training.fingerprint import as_hex, fingerprint
from dsv3_jax.training.manifest import META, MODEL, Damaged, Meta

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A save failed, or no checkpoint is left that verifies."""


def load_weights(directory: Path | str, weights: Any) -> Any:
    """The weights of a checkpoint, verified, on the mesh that is set; nothing else is read or changed.

    Args:
        directory: of one step, of checkpoints (the newest that verifies is taken), or a run's workdir.
        weights: abstract arrays with the shardings to load to.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if none verifies.
        ValueError: if the arrays differ from those wanted; the message names which.
    """
    found = newest(lambda: locate(directory), {MODEL: weights}, None, Path(directory))
    assert found is not None  # locate raises when there is no step
    return found[1][MODEL]


def read_meta(directory: Path | str) -> Meta:
    """The newest record that is intact; see `load_weights` for what `directory` may be."""
    return locate_newest(directory)[1]


def locate_newest(directory: Path | str) -> tuple[Path, Meta]:
    """The newest step whose record is intact; its arrays are not looked at.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if none has an intact record.
    """
    reasons = []
    for _, path in sorted(locate(directory).items(), reverse=True):
        try:
            return path, manifest.read(path)
        except Damaged as error:
            reasons.append(str(error))
    raise CheckpointError(f"No checkpoint in {directory} can be read. {' '.join(reasons)}")


def steps(directory: Path) -> dict[int, Path]:
    """The step directories in a directory of checkpoints, complete or not."""
    names = [p for p in directory.iterdir() if p.name.isascii() and p.name.isdigit() and p.is_dir()]
    return {int(p.name): p for p in names if p.name == str(int(p.name))}


def locate(directory: Path | str) -> dict[int, Path]:
    """The steps that a user may have meant by a directory.

    Raises:
        FileNotFoundError: if there are none.
    """
    root = Path(directory)
    if (root / META).is_dir():
        return {0: root}
    for place in (root, root / "checkpoints"):
        if place.is_dir() and (found := steps(place)):
            return found
    raise FileNotFoundError(
        f"{root} holds no checkpoint: give a run's workdir, its checkpoints directory, or one step."
    )


def newest(
    candidates: Callable[[], dict[int, Path]],
    wanted: Mapping[str, Any],
    model_config: dict[str, Any] | None,
    root: Path,
) -> tuple[Meta, dict[str, Any]] | None:
    """The newest step that verifies and its trees; all processes choose the same.

    Returns:
        None if there are no steps at all.
    """
    found = candidates()
    reasons: list[str] = []
    while (step := _least(max(found, default=-1))) >= 0:
        path = found.pop(step, root / str(step))
        found = {s: p for s, p in found.items() if s < step}
        loaded, reason = None, "another process cannot read it."
        try:
            loaded = _load(path, wanted, model_config)
        except Damaged as error:
            reason = str(error)
        if _least(int(loaded is not None)) and loaded is not None:
            reason = _verify(*loaded)
            if not reason:
                meta, items = loaded
                return meta, {item: manifest.unflatten(tree, items[item]) for item, tree in wanted.items()}
        del loaded
        reasons.append(f"{path}: {reason}")
        _log.warning("Skipping the checkpoint %s: %s", path, reason)
    if not reasons:
        return None
    raise CheckpointError(
        f"Checkpoints exist in {root} but none verifies. {' '.join(reasons)} "
        "Restore one from a backup, or start anew in another --workdir."
    )


def _load(
    path: Path, wanted: Mapping[str, Any], model_config: dict[str, Any] | None
) -> tuple[Meta, dict[str, dict[str, jax.Array]]]:
    """Reads the wanted items of a step; the digests are still to be checked."""
    meta = manifest.read(path)
    if path.name.isdigit() and int(path.name) != meta.step:
        raise Damaged(f"{path} holds step {meta.step}: a directory was renamed.")
    if model_config is not None:
        manifest.check_same_model(meta.model_config, model_config)
    items = {}
    for item, tree in wanted.items():
        if item not in meta.arrays:
            raise ValueError(
                f"{path} holds weights but no {item} state, so it cannot be resumed: name it in "
                "--config.start_from."
            )
        leaves = manifest.flatten(tree)
        manifest.check_leaves(path, meta.arrays[item], leaves)
        if any(0 not in x.shape for x in leaves.values()):
            arrays.refuse_links(path / item)
        items[item] = arrays.read(path / item, meta.arrays[item], leaves)
    return meta, items


def _verify(meta: Meta, items: Mapping[str, Mapping[str, jax.Array]]) -> str:
    """What is wrong with arrays that were read, or nothing."""
    wrong = [
        f"{item}/{name}"
        for item, words in fingerprint(items).items()
        for name, pair in words.items()
        if as_hex(pair) != meta.arrays[item][name].digest
    ]
    return f"the digests of {', '.join(wrong)} do not match what was saved." if wrong else ""


def _least(value: int) -> int:
    """The smallest of all processes' values."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.int32(value))))
