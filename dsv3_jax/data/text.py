"""Plain text: one file is one document."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt64

from dsv3_jax.data.documents import BadDocument, check_text, too_long


class TextFiles:
    """UTF-8 files below a folder; a file's place in the folder decides its split."""

    def __init__(self, root: Path, files: Sequence[Path], max_document_bytes: int):
        """Takes files below `root`; nothing is read yet."""
        self._root, self._files, self._limit = root, tuple(files), max_document_bytes

    def __len__(self) -> int:
        """The number of files."""
        return len(self._files)

    def __getitem__(self, index: int) -> str:
        """The text of one file; raises BadDocument."""
        file = self._files[index]
        try:
            size = file.stat().st_size
            if size > self._limit:
                raise too_long(str(file), size, self._limit)
            data = file.read_bytes()
        except OSError as error:
            raise BadDocument(
                "unreadable", str(file), f"the file cannot be read ({error.strerror})"
            ) from error
        return check_text(decode(data, str(file), 1), str(file), self._limit)

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """Hashes of the paths relative to the folder."""
        return np.array([hash_name(f.relative_to(self._root).as_posix()) for f in self._files], np.uint64)


def decode(data: bytes, file: str, line: int) -> str:
    """Text from UTF-8 bytes that begin at a line of a file; raises BadDocument naming the line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        problem = f"byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason})"
        raise BadDocument("not UTF-8", f"{file}:{line}", problem) from None


def hash_name(name: str) -> int:
    """A number below 2**64 that depends on the name alone, on every machine."""
    return int.from_bytes(
        hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )
