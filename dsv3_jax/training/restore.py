"""Restoring: the newest step that verifies, its record and its arrays, whatever happened to the others."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dsv3_jax.training import manifest
from dsv3_jax.training.manifest import META, MODEL, Damaged, Meta
from dsv3_jax.training.parts import Parts, Read, least, together

T = TypeVar("T")

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
    return load_parts(directory, weights, lambda read: read())


def load_parts(directory: Path | str, weights: Any, build: Callable[[Read], T]) -> T:
    """What is made of weights that are read a part at a time, so that they are never held all together.

    Args:
        directory: as for `load_weights`, with its errors.
        weights: abstract arrays with the shardings to load to.
        build: reads every element once, a part at a time, and makes something of each. If a step does not
            verify it is called again, for an older one.
    """

    def load(path: Path) -> T:
        meta = together(lambda: _record(path))
        parts = together(lambda: Parts(path / MODEL, meta.arrays[MODEL], weights))
        built = build(parts.read)
        parts.check()
        return built

    found = newest(lambda: locate(directory), load, Path(directory))
    assert found is not None  # locate raises when there is no step
    return found


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


def newest(candidates: Callable[[], dict[int, Path]], load: Callable[[Path], T], root: Path) -> T | None:
    """What is loaded of the newest step that verifies; all processes choose the same.

    Args:
        load: raises Damaged in all processes if the step does not verify.

    Returns:
        None if there are no steps at all.
    """
    found = candidates()
    reasons: list[str] = []
    while (step := least(max(found, default=-1))) >= 0:
        path = found.pop(step, root / str(step))
        found = {s: p for s, p in found.items() if s < step}
        try:
            return load(path)
        except Damaged as error:
            reasons.append(f"{path}: {error}")
            _log.warning("Skipping the checkpoint %s: %s", path, error)
    if not reasons:
        return None
    raise CheckpointError(
        f"Checkpoints exist in {root} but none verifies. {' '.join(reasons)} "
        "Restore one from a backup, or start anew in another --workdir."
    )


def load_items(path: Path, wanted: Mapping[str, Any], model_config: dict[str, Any]) -> tuple[Meta, list[Any]]:
    """The record of a step and the trees of its items, verified.

    Raises:
        Damaged: in all processes, if it does not verify.
        ValueError: if it is of another model, or its arrays differ; the message names which.
    """
    meta = together(lambda: _record(path))
    manifest.check_same_model(meta.model_config, model_config)
    if missing := wanted.keys() - meta.arrays.keys():
        raise ValueError(
            f"{path} holds weights but no {', '.join(missing)} state, so it cannot be resumed: name it in "
            "--config.start_from."
        )
    opened = together(lambda: [Parts(path / item, meta.arrays[item], tree) for item, tree in wanted.items()])
    trees = []
    for parts in opened:
        trees.append(parts.read())
        parts.check()
    return meta, trees


def _record(path: Path) -> Meta:
    meta = manifest.read(path)
    if path.name.isdigit() and int(path.name) != meta.step:
        raise Damaged(f"{path} holds step {meta.step}: a directory was renamed.")
    return meta
