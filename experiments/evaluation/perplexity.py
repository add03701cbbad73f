"""How well a model predicts texts: nats per token, perplexity, and bits per byte.

A text of tokens t_1 .. t_n is x = [p, t_1, .. t_n], where p is what a text comes after: the token that texts
begin with, or the end of a document. The first window is the first `length` positions of x and scores their
successors; each next one ends `stride` tokens further and scores these alone. So every token is scored once,
with at least `length - stride` positions before it where the text has them. From the sums over a source,

    nats per token = -sum(log p) / tokens
    perplexity     = exp(nats per token)
    bits per byte  = -sum(log p) / (ln 2 * bytes of UTF-8)

so that bits per byte can be compared between tokenizers, and perplexities cannot.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dsv3_jax.data.corpus import Subset
from dsv3_jax.data.documents import BadDocument, Documents, OnBad, Skipped
from experiments.scoring import Scorer

_TOGETHER = 64  # batches of windows that are put in order of length


class Window(NamedTuple):
    """Positions that are looked at together, and how many of the last are scored."""

    tokens: Int[np.ndarray, " n"]
    scored: int


@dataclass
class Figures:
    """Sums over the texts of a source."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0

    def record(self) -> dict[str, Any]:
        """The sums and what follows from them; nothing follows from no text."""
        sums = {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens}
        if not self.tokens:
            return sums
        each = self.nats / self.tokens
        return {
            **sums,
            "nats_per_token": each,
            "perplexity": math.exp(each) if each < 700 else math.inf,
            "bits_per_byte": self.nats / (math.log(2) * self.bytes),
        }


@dataclass
class Reader:
    """Turns texts into windows and counts them.

    Attributes:
        encode: gives the tokens of a text.
        before: the token that a text comes after.
        on_bad: what to do about texts that cannot be read.
    """

    encode: Callable[[str], Int[np.ndarray, " n"]]
    before: int
    length: int
    stride: int
    on_bad: OnBad
    skipped: Skipped
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self):
        """Refuses windows that leave tokens out."""
        if not 0 < self.stride <= self.length:
            raise ValueError(
                f"stride={self.stride} must be from 1 to length={self.length}, or tokens would be left out."
            )

    def windows(self, documents: Documents | Subset) -> Iterator[Window]:
        """The windows of all texts."""
        for n in range(len(documents)):
            try:
                text = documents[n]
            except BadDocument as bad:
                self.on_bad(bad, self.skipped)
                continue
            tokens = self.encode(text)
            self.figures.documents += 1
            self.figures.bytes += len(text.encode("utf-8"))
            self.figures.tokens += len(tokens)
            yield from windows(np.concatenate([[self.before], tokens]), self.length, self.stride)


def windows(x: Int[np.ndarray, " n+1"], length: int, stride: int) -> Iterator[Window]:
    """Every token but the first scored once."""
    last, done = len(x) - 1, 0
    while done < last:
        end = min(done + (stride if done else length), last)
        yield Window(x[max(0, end - length) : end + 1], end - done)
        done = end


def measure(scorer: Scorer, reader: Reader, documents: Documents | Subset) -> Figures:
    """Reads and scores a source; memory is that of a few batches of windows."""
    for some in _together(reader.windows(documents), _TOGETHER * scorer.batch_size):
        for window, found in zip(some, scorer.score([w.tokens for w in some]), strict=True):
            reader.figures.nats -= float(np.sum(found.logprobs[-window.scored :], dtype=np.float64))
    return reader.figures


def _together(items: Iterable[Window], most: int) -> Iterator[list[Window]]:
    some: list[Window] = []
    for item in items:
        some.append(item)
        if len(some) == most:
            yield some
            some = []
    if some:
        yield some
