"""A strict reader of safetensors files and of folders of them; nothing in a file is believed unchecked.

The safetensors package cannot read FP8 through numpy; here ml_dtypes supplies the types. Tensors are read
into fresh memory in bands of rows, not mapped, so that what a conversion holds is what it has asked for.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}

_MAX_HEADER = 100_000_000  # bytes; the limit of the format's own library
_MAX_INDEX = 1 << 30  # bytes
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_\-.]*\.safetensors")
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class BadFile(ValueError):
    """A file that is not what it must be; the message names it."""


class Entry(NamedTuple):
    """Where a tensor is."""

    file: Path
    dtype: str  # a key of TYPES
    shape: tuple[int, ...]
    start: int  # byte of the file


class Folder:
    """The tensors of a folder: `model.safetensors`, or shards that an index lists."""

    def __init__(self, directory: Path | str):
        """Reads the index and every header; tensors are read when asked for.

        Raises:
            BadFile: if a file is missing, damaged or a pickle, if the index names a file that is not in
                the folder itself, or if index and headers disagree.
        """
        self.directory = Path(directory)
        self.listing, wanted = _files(self.directory)
        self.entries: dict[str, Entry] = {}
        for file in wanted:
            for name, entry in read_header(self.directory / file).items():
                if name in self.entries:
                    raise BadFile(
                        f"The tensor {name} is in {self.entries[name].file} and again in "
                        f"{entry.file}: keep one of them."
                    )
                self.entries[name] = entry
        if self.listing.name == INDEX:
            _check_index(self.listing, {n: f for f, names in wanted.items() for n in names}, self.entries)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor, along its first axis.

        Raises:
            BadFile: if the file has become shorter than its header says.
        """
        entry = self.entries[name]
        first, last, _ = rows.indices(entry.shape[0])
        block = np.empty((last - first, *entry.shape[1:]), TYPES[entry.dtype])
        row = math.prod(entry.shape[1:]) * block.itemsize
        view = block.reshape(-1).view(np.uint8).data
        try:
            with entry.file.open("rb", buffering=0) as f:
                f.seek(entry.start + first * row)
                while view.nbytes and (count := f.readinto(view)):
                    view = view[count:]
        except OSError as error:
            raise BadFile(f"The tensor {name} cannot be read from {entry.file}: {error.strerror}.") from error
        if view.nbytes:
            raise BadFile(f"{entry.file} ends within the tensor {name}: it was truncated; fetch it again.")
        return block


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file, after the header was found to describe every byte of it exactly once.

    Raises:
        BadFile: naming the file, and the tensor where there is one.
    """
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise BadFile(
                    f"{file} is {size} bytes but its header alone claims {length} (at most "
                    f"{_MAX_HEADER} are read): it was "
                    "truncated or is no safetensors file; fetch it again."
                )
            header = json.loads(f.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise BadFile(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(
            f"The header of {file} is not the JSON it must be ({error}); fetch it again."
        ) from error
    if not isinstance(header, dict):
        raise BadFile(
            f"The header of {file} is a JSON {type(header).__name__}, not an object; fetch it again."
        )
    _check_metadata(file, header.pop("__metadata__", {}))
    spans = {name: _span(file, name, value) for name, value in header.items()}
    _check_cover(file, spans, size - 8 - length)
    return {
        name: Entry(file, value["dtype"], tuple(value["shape"]), 8 + length + spans[name][0])
        for name, value in header.items()
    }


def _files(directory: Path) -> tuple[Path, dict[str, list[str]]]:
    """The file that lists the tensors, and the files to read with the tensors the index puts there."""
    try:
        present = sorted(p.name for p in directory.iterdir())
    except OSError as error:
        raise BadFile(f"{directory} cannot be listed: {error.strerror}.") from error
    if INDEX in present:
        index = _read_index(directory / INDEX)
        missing = sorted(set(index) - set(present))
        if missing:
            raise BadFile(
                f"{directory / INDEX} lists {', '.join(missing)}, not present in the folder; fetch "
                "what is missing."
            )
        stray = [p for p in present if p.endswith(".safetensors") and p not in index]
        if stray:
            raise BadFile(
                f"{directory / INDEX} does not list {', '.join(stray)}: remove what does not belong to it."
            )
        return directory / INDEX, index
    found = [p for p in present if p.endswith(".safetensors")]
    if found == [SINGLE]:
        return directory / SINGLE, {SINGLE: []}
    if found:
        raise BadFile(
            f"{directory} has {', '.join(found[:4])} but no {INDEX}, so nobody knows whether that is "
            "all; fetch the index."
        )
    pickles = [p for p in present if p.endswith(_PICKLE)]
    if pickles:
        raise BadFile(
            f"{directory / pickles[0]} is a pickle, which would run as code and is never read: "
            "convert it to safetensors "
            "where it was made."
        )
    raise BadFile(f"{directory} has neither {SINGLE} nor {INDEX}: give the folder of a released checkpoint.")


def _read_index(path: Path) -> dict[str, list[str]]:
    """The tensors of each file, as an index lists them."""
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise BadFile(f"{path} is larger than {_MAX_INDEX} bytes, which no index is; fetch it again.")
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"{path} is not the JSON it must be ({error}); fetch it again.") from error
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise BadFile(f"{path} has no weight_map that lists tensors; fetch it again.")
    files: dict[str, list[str]] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or not _NAME.fullmatch(file):
            raise BadFile(
                f"{path} puts the tensor {name} into {file!r}, which is no name of a .safetensors "
                "file in the same folder; "
                "nothing outside is ever opened."
            )
        files.setdefault(file, []).append(name)
    return files


def _check_index(index: Path, listed: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    for name, file in listed.items():
        if name not in entries or entries[name].file.name != file:
            raise BadFile(
                f"{index} puts the tensor {name} into {file}, whose header does not have it; fetch "
                "both again."
            )
    for name, entry in entries.items():
        if name not in listed:
            raise BadFile(
                f"{entry.file} has the tensor {name}, which {index} does not list; fetch both again."
            )


def _check_metadata(file: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadFile(f"The __metadata__ of {file} is not an object of strings; fetch it again.")


def _span(file: Path, name: str, value: Any) -> tuple[int, int]:
    """The bytes of a tensor within the data, as many as its shape and type take."""
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if not rest:
            pass
        case _:
            raise BadFile(
                f"The header of {file} describes the tensor {name} by something else than type, shape "
                "and offsets; "
                "fetch it again."
            )
    if dtype not in TYPES:
        raise BadFile(
            f"The tensor {name} in {file} has the unknown type {dtype!r}; known are {', '.join(TYPES)}."
        )
    if not all(type(n) is int and 0 <= n < 1 << 60 for n in (*shape, start, end)):
        raise BadFile(
            f"The tensor {name} in {file} has the shape {shape} at {start}..{end}, which cannot be."
        )
    size = math.prod(shape) * TYPES[dtype].itemsize
    if end - start != size:
        raise BadFile(
            f"The tensor {name} in {file} is {dtype}{shape}, {size} bytes, but has the bytes "
            f"{start}..{end}; fetch it again."
        )
    return start, end


def _check_cover(file: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Refuses gaps, overlaps, and data beyond the end or beyond the last tensor."""
    at = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at:
            raise BadFile(
                f"The tensor {name} in {file} begins at byte {start} of the data where {at} is next; "
                "fetch it again."
            )
        if end > size:
            raise BadFile(
                f"The tensor {name} in {file} ends at byte {end} of the data, of which there are "
                f"{size}: the file was "
                "truncated; fetch it again."
            )
        at = end
    if at != size:
        raise BadFile(f"{file} has {size - at} bytes of data that belong to no tensor; fetch it again.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without repeated keys."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"{key!r} occurs twice")
        out[key] = value
    return out
