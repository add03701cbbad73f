"""What a document is, how a bad one is reported, and the two answers to it: refuse or skip and count."""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt64

_LOGGED_EACH = 20  # bad records named one by one in the log; all of them are counted


class BadDocument(ValueError):
    """A record that cannot be trained on.

    Attributes:
        reason: a short name that equal problems share; skipped records are counted by it.
        where: the file, and the line or record in it.
    """

    def __init__(self, reason: str, where: str, problem: str):
        """Makes the message from the parts."""
        super().__init__(
            f"{where}: {problem}; repair or remove it, or set config.data.on_bad=skip to skip and count "
            "such records."
        )
        self.reason, self.where, self.problem = reason, where, problem


@runtime_checkable
class Documents(Protocol):
    """Documents with random access; a grain source."""

    def __len__(self) -> int:
        """The number of documents, bad ones included."""
        ...

    def __getitem__(self, index: int) -> str:
        """The text of one document.

        Raises:
            BadDocument: naming the file and line, if there is no text to be had.
        """
        ...

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """A number for each document that never changes; the validation split is made of the lowest ones."""
        ...


class Skipped:
    """Counts bad documents, each once however often it is met."""

    def __init__(self):
        """Starts at zero."""
        self._lock = threading.Lock()  # loaders read in threads
        self._seen: set[str] = set()
        self._counts: Counter[str] = Counter()

    def add(self, bad: BadDocument) -> None:
        """Counts and logs a bad document."""
        with self._lock:
            if bad.where in self._seen:
                return
            self._seen.add(bad.where)
            self._counts[bad.reason] += 1
            if self._counts[bad.reason] > _LOGGED_EACH:
                return
        logging.getLogger(__name__).warning("Skipped %s: %s.", bad.where, bad.problem)

    def counts(self) -> dict[str, int]:
        """The number of bad documents met so far, by reason."""
        with self._lock:
            return dict(sorted(self._counts.items()))


OnBad = Callable[[BadDocument, Skipped], None]


def refuse(bad: BadDocument, skipped: Skipped) -> None:
    """Ends the run at the first bad document."""
    raise bad


def skip(bad: BadDocument, skipped: Skipped) -> None:
    """Leaves a bad document out, counted and logged."""
    skipped.add(bad)


ON_BAD: dict[str, OnBad] = {"error": refuse, "skip": skip}


def check_text(text: object, where: str, max_document_bytes: int) -> str:
    """The text of a record, if it is one that can be encoded.

    Raises:
        BadDocument: if it is no string, is empty, holds a lone surrogate, or is longer than the limit.
    """
    if not isinstance(text, str):
        raise BadDocument("not a string", where, f"the text is of type {type(text).__name__}, not a string")
    if not text:
        raise BadDocument("empty", where, "the text is empty")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadDocument(
            "lone surrogate", where, f"character {error.start} of the text is half of a surrogate pair"
        ) from None
    if size > max_document_bytes:
        raise too_long(where, size, max_document_bytes)
    return text


def too_long(where: str, size: int, max_document_bytes: int) -> BadDocument:
    """The report of a document above the limit; sizes in bytes."""
    return BadDocument(
        "too long",
        where,
        f"the document has {size} bytes, above config.data.max_document_bytes={max_document_bytes}",
    )
