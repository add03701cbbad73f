"""Where documents come from: files of text and of records, and the standard library's own source."""

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from dsv3_jax.data.documents import BadDocument, Documents, OnBad, Skipped
from dsv3_jax.data.needles import WithNeedles
from dsv3_jax.data.records import ArrayRecords, JsonLines, ParquetRows
from dsv3_jax.data.text import TextFiles

STDLIB = "stdlib"
NEEDLES = "stdlib+needles"

Opener = Callable[[Path, str, str, int], Documents]  # file, its name for hashing, text key, limit in bytes

OPENERS: dict[str, Opener] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": ParquetRows,
    ".arrayrecord": ArrayRecords,
    ".array_record": ArrayRecords,
}
"""Files with these suffixes hold many documents; any other file is one document."""

_LIBRARY_SUFFIXES = (".py", ".txt", ".rst")
_LIBRARY_EXCLUDED = ("test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages")


def open_source(
    path: str, text_key: str, max_document_bytes: int, on_bad: OnBad, skipped: Skipped
) -> Documents:
    """Opens a file, a folder (all its files), a glob, or the embedded corpus by a name of `_EMBEDDED`.

    Raises:
        FileNotFoundError: if nothing is there.
        BadDocument: if a file of records cannot be opened and `on_bad` refuses it.
    """
    if path in _EMBEDDED:
        return _EMBEDDED[path](max_document_bytes)
    root, files = _find(path)
    plain = [f for f in files if f.suffix not in OPENERS]
    parts: list[Documents] = [TextFiles(root, plain, max_document_bytes)] if plain else []
    for file in files:
        if file.suffix in OPENERS:
            try:
                name = file.relative_to(root).as_posix()
                parts.append(OPENERS[file.suffix](file, name, text_key, max_document_bytes))
            except BadDocument as bad:
                on_bad(bad, skipped)
    if not sum(map(len, parts)):
        raise ValueError(
            f"{path}: all {len(files)} files were skipped, so it gives no documents; repair one of them."
        )
    return parts[0] if len(parts) == 1 else Chained(parts)


def standard_library(max_document_bytes: int) -> Documents:
    """The source and text of the Python that runs, without tests: about 12 MB of code and English."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in _walk(root, _LIBRARY_EXCLUDED) if f.suffix in _LIBRARY_SUFFIXES]
    # Build settings differ per machine, and empty __init__.py files are no documents.
    files = [f for f in files if not f.name.startswith("_sysconfigdata") and f.stat().st_size]
    if not files:
        raise FileNotFoundError(
            f"{root} holds no source of the standard library (a zipped or stripped Python?); "
            "name your own text in config.data.sources."
        )
    return TextFiles(root, files, max_document_bytes)


_EMBEDDED: dict[str, Callable[[int], Documents]] = {
    STDLIB: standard_library,
    NEEDLES: lambda most: WithNeedles(standard_library(most)),
}


class Chained:
    """Several sources as one."""

    def __init__(self, parts: list[Documents]):
        """Takes the parts in order; at least one is not empty."""
        self._parts = parts
        self._ends = np.cumsum([len(p) for p in parts])

    def __len__(self) -> int:
        """The number of documents of all parts."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        """One document; raises BadDocument."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """The numbers of all parts, in order."""
        return np.concatenate([p.hashes() for p in self._parts])


class Subset:
    """Some of the documents, in a given order; `indices` are those of the whole."""

    def __init__(self, documents: Documents, indices: Int64[np.ndarray, " subset"]):
        """Takes the numbers of the documents to keep."""
        self.documents, self.indices = documents, indices

    def __len__(self) -> int:
        """The number of documents chosen."""
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        """One document; raises BadDocument."""
        return self.documents[int(self.indices[index])]

    def digest(self) -> int:
        """A number that tells this choice of documents from another, by their names."""
        return int(np.bitwise_xor.reduce(self.documents.hashes()[self.indices], initial=0))


def split(documents: Documents, validation_fraction: float) -> tuple[Subset, Subset]:
    """Training and validation documents, chosen by hash, so that adding files never moves one across.

    Training documents keep their order; validation documents are ordered by hash, so that the first few
    are a fair sample.
    """
    hashes = documents.hashes()
    held_out = hashes < np.uint64(min(int(validation_fraction * 2**64), 2**64 - 1))
    validation = np.flatnonzero(held_out)
    order = np.argsort(hashes[validation], kind="stable")
    return Subset(documents, np.flatnonzero(~held_out)), Subset(documents, validation[order])


def _find(path: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files, sorted by name."""
    place = Path(path).expanduser()
    if place.is_dir():
        root, files = place, _walk(place, ())
    elif place.exists():
        root, files = place.parent, [place]
    else:
        files = sorted(Path(f) for f in glob.glob(str(place), recursive=True) if not os.path.isdir(f))
        root = Path(os.path.commonpath([f.parent for f in files])) if files else place
    if not files:
        raise FileNotFoundError(
            f"{path}: there is no such file, folder of files or pattern; give config.data.sources a path "
            f"that exists, or {STDLIB!r} for the embedded corpus."
        )
    return root, files


def _walk(root: Path, excluded: Iterable[str]) -> list[Path]:
    """All files below a folder, hidden and excluded names left out, in an order that only names decide."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in excluded]
        found += [Path(folder, n) for n in names if not n.startswith(".")]
    return sorted(found, key=lambda f: f.relative_to(root).as_posix())
