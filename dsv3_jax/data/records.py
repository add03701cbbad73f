"""Files that hold many documents, with random access: JSONL, Parquet and ArrayRecord."""

import json
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np
from grain.sources import ArrayRecordDataSource, RandomAccessDataSource
from jaxtyping import Int64, UInt64

from dsv3_jax.data.documents import BadDocument, check_text, too_long
from dsv3_jax.data.text import decode, hash_name

_INDEX_BYTES = 1 << 24  # read at a time while looking for line ends
_ROW_GROUPS = 4  # of Parquet, kept decoded
_JSON_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class JsonLines:
    """One JSON object a line, the text under a key.

    The places of the line ends are found once, in blocks, so no line is ever read just to pass it.
    """

    def __init__(self, file: Path, name: str, text_key: str, max_document_bytes: int):
        """Opens a file; `name` tells its records' hashes from those of other files."""
        self._file, self._name, self._key, self._limit = file, name, text_key, max_document_bytes
        self._ends = _opened(file, _line_ends)
        if not len(self._ends):
            raise BadDocument("empty", str(file), "the file is empty")

    def __len__(self) -> int:
        """The number of lines."""
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """The text of one line; raises BadDocument."""
        where = f"{self._file}:{index + 1}"
        start = int(self._ends[index - 1]) if index else 0
        size = int(self._ends[index]) - start
        # JSON escapes take at most six bytes for one of text; the rest is room for other keys.
        if size > 6 * self._limit + 4096:
            raise too_long(where, size, self._limit)
        try:
            with self._file.open("rb") as f:
                f.seek(start)
                data = f.read(size)
        except OSError as error:
            raise _unreadable(where, error) from error
        return check_text(self._text(decode(data, str(self._file), index + 1), where), where, self._limit)

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """Hashes of line numbers."""
        return _hash_records(self._name, len(self))

    def _text(self, line: str, where: str) -> object:
        try:
            record = json.loads(line)
        except RecursionError:
            raise BadDocument("not JSON", where, "the JSON is nested too deep to read") from None
        except json.JSONDecodeError as error:
            problem = f"the line is not JSON ({error.msg} at character {error.pos})"
            raise BadDocument("not JSON", where, problem) from None
        except ValueError:  # Python's limit on the digits of an integer
            raise BadDocument("not JSON", where, "the line holds a number too long to read") from None
        if not isinstance(record, dict):
            kind = _JSON_KINDS[type(record)]
            raise BadDocument("not an object", where, f"the line holds {kind}, not an object")
        if self._key not in record:
            keys = ", ".join(sorted(record)[:8])[:200] or "none"
            raise BadDocument("no text key", where, f"the object has no key {self._key!r} (it has: {keys})")
        return record[self._key]


class ParquetRows:
    """A column of text.

    Reading a row decodes its row group, of which a few are kept: for shuffled reading of large files
    ArrayRecord is the better format.
    """

    def __init__(self, file: Path, name: str, text_key: str, max_document_bytes: int):
        """Opens a file; `name` tells its records' hashes from those of other files."""
        self._file, self._name, self._key, self._limit = file, name, text_key, max_document_bytes
        self._lock, self._groups = Lock(), OrderedDict()
        meta, columns = _opened(file, _parquet_metadata)
        if text_key not in columns:
            raise BadDocument(
                "no text key",
                str(file),
                f"the table has no column {text_key!r} (it has: {', '.join(columns)[:200]})",
            )
        self._ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
        if not meta.num_rows:
            raise BadDocument("empty", str(file), "the table has no rows")

    def __len__(self) -> int:
        """The number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
        """The text of one row; raises BadDocument."""
        where = f"{self._file}:{index + 1}"
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        try:
            text = self._column(group, where)[index - first].as_py()
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        return check_text(text, where, self._limit)

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """Hashes of row numbers."""
        return _hash_records(self._name, len(self))

    def _column(self, group: int, where: str):
        with self._lock:
            if group not in self._groups:
                parquet = _pyarrow_parquet()
                try:
                    with parquet.ParquetFile(self._file) as table:
                        column = table.read_row_group(group, columns=[self._key]).column(0)
                except (OSError, ValueError) as error:  # Arrow's errors are one or the other
                    raise _unreadable(where, error) from error
                self._groups[group] = column.combine_chunks()
                if len(self._groups) > _ROW_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]


class ArrayRecords:
    """Records of UTF-8 text in ArrayRecord, a format made for random access."""

    def __init__(self, file: Path, name: str, text_key: str, max_document_bytes: int):
        """Opens a file; `name` tells its records' hashes from those of other files."""
        del text_key  # a record is the text itself
        self._file, self._name, self._limit = file, name, max_document_bytes
        self._count = len(self._records) if _opened(file, lambda f: f.stat().st_size) else 0
        if not self._count:
            raise BadDocument("empty", str(file), "the file has no records")

    def __len__(self) -> int:
        """The number of records."""
        return self._count

    def __getitem__(self, index: int) -> str:
        """The text of one record; raises BadDocument."""
        where = f"{self._file}:{index + 1}"
        try:
            data = self._records[index]
        except (OSError, ValueError, RuntimeError, IndexError) as error:  # by the kind of damage
            raise _unreadable(where, error) from error
        if len(data) > self._limit:
            raise too_long(where, len(data), self._limit)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error) from None
        return check_text(text, where, self._limit)

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """Hashes of record numbers."""
        return _hash_records(self._name, len(self))

    @cached_property
    def _records(self) -> RandomAccessDataSource[bytes]:
        source = _opened(self._file, lambda f: ArrayRecordDataSource([str(f)]))
        return cast(RandomAccessDataSource[bytes], source)  # grain's alias hides the methods


def _opened(file: Path, read):
    """What `read` finds in the file; raises BadDocument if the file as a whole is damaged."""
    try:
        return read(file)
    except (OSError, ValueError, RuntimeError) as error:  # each library has its own for damage
        raise _unreadable(str(file), error) from error


def _unreadable(where: str, error: Exception) -> BadDocument:
    said = " ".join(str(error).split())[:300]
    return BadDocument("unreadable", where, f"it cannot be read ({said})")


def _not_utf8(where: str, error: UnicodeDecodeError) -> BadDocument:
    return BadDocument("not UTF-8", where, f"byte {error.start} of the record is not UTF-8 ({error.reason})")


def _line_ends(file: Path) -> Int64[np.ndarray, " lines"]:
    """The byte after each line end; a last line needs none."""
    ends, position = [np.zeros(0, np.int64)], 0
    with file.open("rb") as f:
        last = b"\n"
        while block := f.read(_INDEX_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
            position, last = position + len(block), block[-1:]
    return np.concatenate(ends if last == b"\n" else [*ends, np.array([position])])


def _parquet_metadata(file: Path):
    with _pyarrow_parquet().ParquetFile(file) as table:
        return table.metadata, table.schema_arrow.names


def _pyarrow_parquet():
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files are read by pyarrow, which is not installed; install the extra: "
            "pip install 'dsv3-jax[parquet]'."
        ) from error
    return parquet


def _hash_records(name: str, count: int) -> UInt64[np.ndarray, " documents"]:
    """Hashes of (file, record number): the finaliser of splitmix64, because there may be very many."""
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(hash_name(name))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
