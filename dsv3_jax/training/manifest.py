"""The JSON beside the arrays of a checkpoint: what they are, their digests, and what a run needs to go on.

A step is a directory `DIR/<step>` with three items: `model` (the weights and the expert bias), `training`
(everything else in the state, absent in converted weights) and `meta` (this file's text). An item is a flat
mapping from dotted leaf names to arrays; an array without elements is listed here but has no file.
"""

import dataclasses
import hashlib
import json
import platform
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

MODEL, TRAINING, META = "model", "training", "meta"
META_FILE = "metadata"  # the name Orbax gives the file of a JSON item

_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MAX_BYTES = 1 << 30  # of text: data loader states may be long, but not longer


class Damaged(ValueError):
    """A step that is incomplete, unreadable or fails its digests."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """What an array must be when it comes back."""

    shape: tuple[int, ...]
    dtype: str
    digest: str  # sixteen hexadecimal digits of `fingerprint`


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Everything in a step that is not an array.

    `config` is the resolved configuration of the run and `model_config` its part that fixes the shapes and
    meaning of the weights; `data` maps each shard of the loader to its position.
    """

    step: int
    config: dict[str, Any]
    model_config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str]
    arrays: dict[str, dict[str, Leaf]]  # item, then leaf name

    def to_json(self) -> dict[str, Any]:
        """The object that is stored, sealed with a digest of its own text."""
        body = {"format": _FORMAT, **dataclasses.asdict(self)}
        return {"sha256": _seal(body), **body}


def versions() -> dict[str, str]:
    """The versions that wrote a checkpoint, for whoever has to find out why two differ."""
    return {"python": platform.python_version(), "jax": jax.__version__}


def read(step_directory: Path) -> Meta:
    """The meta of a step.

    Raises:
        Damaged: if the file is absent, unreadable or not what was written.
    """
    path = step_directory / META / META_FILE
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise Damaged(f"{path} is a link, a device or larger than {_MAX_BYTES} bytes.")
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path} is missing, so the step was never completed.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Damaged(f"{path} cannot be read: {error}.") from error
    if not isinstance(body, dict) or body.pop("sha256", None) != _seal(body):
        raise Damaged(f"{path} does not match the digest of its own text.")
    if body.pop("format", None) != _FORMAT:
        raise Damaged(f"{path} has another format than {_FORMAT}, the only one this version reads.")
    return _decode(body, path)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted name, in the tree's order."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _NAME.fullmatch(name) or name in leaves:
            raise ValueError(
                f"The leaf {name!r} cannot name a file or occurs twice: "
                "use letters, digits, - and _ for keys, without dots."
            )
        leaves[name] = leaf
    return leaves


def unflatten(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `flatten`, with the structure of a tree."""
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[name] for name in flatten(tree)])


def check_leaves(step_directory: Path, stored: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose arrays are not those of the program, naming every difference.

    Raises:
        ValueError: with one sentence per leaf that is missing, unknown or of another shape or type.
    """
    wrong = []
    for name, leaf in wanted.items():
        if name not in stored:
            wrong.append(f"{name} is not in the checkpoint.")
        elif stored[name].shape != tuple(leaf.shape) or stored[name].dtype != str(leaf.dtype):
            have = stored[name]
            wrong.append(
                f"{name} is {have.dtype}{list(have.shape)} in the checkpoint "
                f"but {leaf.dtype}{list(leaf.shape)} here."
            )
    wrong += [f"{name} is in the checkpoint but unknown here." for name in stored if name not in wanted]
    if wrong:
        raise ValueError(
            f"{step_directory} holds other arrays than this configuration: "
            + " ".join(wrong)
            + " Use the configuration that wrote it, or another work directory."
        )


def check_same_model(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to go on from a checkpoint of another model.

    Raises:
        ValueError: naming each key that differs, as `config.model.KEY`, with both values.
    """
    # Through JSON, because the saved one came through it: tuples are lists there.
    old, new = (_dotted(json.loads(json.dumps(c)), "config.model") for c in (saved, current))
    absent = "absent"
    wrong = [
        f"{key} is {new.get(key, absent)} but the checkpoint has {old.get(key, absent)}."
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]
    if wrong:
        raise ValueError(
            "The checkpoint is of another model: "
            + " ".join(wrong)
            + " Set these keys to the checkpoint's values, or choose another --workdir."
        )


def _dotted(config: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    return {k: v for key, value in config.items() for k, v in _dotted(value, f"{prefix}.{key}").items()}


def _seal(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _decode(body: dict[str, Any], path: Path) -> Meta:
    """Builds the record from text whose digest was right, which a stranger may still have written."""
    try:
        arrays = {
            item: {
                name: Leaf(shape=tuple(v["shape"]), dtype=v["dtype"], digest=v["digest"])
                for name, v in leaves.items()
            }
            for item, leaves in body.pop("arrays").items()
        }
        meta = Meta(arrays=arrays, **body)
    except (TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{path} lacks a field or has one too many: {error}.") from error
    if type(meta.step) is not int or not all(
        isinstance(d, dict) for d in (meta.config, meta.model_config, meta.data)
    ):
        raise Damaged(f"{path} has a step that is no number, or a config or loader state that is no object.")
    for leaves in arrays.values():
        for name, leaf in leaves.items():
            if not _NAME.fullmatch(name) or not all(isinstance(n, int) and n >= 0 for n in leaf.shape):
                raise Damaged(f"{path} lists an array {name!r} with a name or shape that no array can have.")
    return meta
