"""Arrays of a step on their way to the devices, all at once or a part at a time, and their digests."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.training import arrays, manifest
from dsv3_jax.training.fingerprint import as_hex, fingerprint
from dsv3_jax.training.manifest import Damaged, Leaf

T = TypeVar("T")


class Read(Protocol):
    """Reads a part of the arrays; see `Parts.read`."""

    def __call__(self, select: Callable[[Any], Any] = ..., row: int | None = ...) -> Any:
        """The arrays."""


class Parts:
    """The arrays of one item of a step. All processes call the methods together, with the same arguments."""

    def __init__(self, directory: Path, stored: Mapping[str, Leaf], wanted: Any):
        """Opens nothing yet.

        Args:
            directory: of the item.
            stored: what the record says of its arrays.
            wanted: abstract arrays, as for `arrays.read`.

        Raises:
            Damaged: if the directory holds anything but plain files.
            ValueError: if the arrays differ from those wanted; the message names which.
        """
        self._directory, self._stored, self._wanted = directory, stored, manifest.flatten(wanted)
        manifest.check_leaves(directory.parent, stored, self._wanted)
        self._names = manifest.unflatten(wanted, {name: name for name in self._wanted})
        self._words = {name: np.zeros(2, np.uint32) for name in self._wanted}
        if any(0 not in x.shape for x in self._wanted.values()):
            arrays.refuse_links(directory)

    def read(self, select: Callable[[Any], Any] = lambda tree: tree, row: int | None = None) -> Any:
        """Some arrays, on their devices; their digests are counted for `check`.

        Args:
            select: takes the part of the wanted tree that is asked for.
            row: along the first axis, of which the arrays then have one; None for all.

        Raises:
            Damaged: in all processes, if an array cannot be read in one.
        """
        tree = select(self._names)
        wanted = {name: self._wanted[name] for name in jax.tree.leaves(tree)}
        found = together(lambda: arrays.read(self._directory, self._stored, wanted, row))
        for name, words in fingerprint(found, row or 0).items():
            self._words[name] += words
        return jax.tree.map(found.__getitem__, tree)

    def check(self) -> None:
        """Compares the digests, after every element was read once.

        Raises:
            Damaged: naming every array that is not what was saved.
        """
        digests = {name: leaf.digest for name, leaf in self._stored.items()}
        wrong = [name for name, words in self._words.items() if as_hex(words) != digests[name]]
        if wrong:
            names = ", ".join(f"{self._directory.name}/{name}" for name in wrong)
            raise Damaged(f"the digests of {names} do not match what was saved.")


def together(read: Callable[[], T]) -> T:
    """What a read of this process gives, once all processes have theirs.

    Raises:
        Damaged: in all processes, if the read raises it in one.
    """
    result, reason = None, "another process cannot read it."
    try:
        result = read()
    except Damaged as error:
        reason = str(error)
    if not least(int(result is not None)) or result is None:
        raise Damaged(reason)
    return result


def least(value: int) -> int:
    """The smallest of all processes' values."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.int32(value))))
