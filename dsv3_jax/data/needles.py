"""Text with needles in it: lines that have nothing to do with the text, and are said again further on.

A needle is a comment such as `# seal Λжé`, three letters of scripts that source code has no use for. Most
needles say what the one before said, which can be told only by looking back to it. In some documents a needle
stands after every line and in some after every 256th, any power of two as often as another. A needle is known
by what it is made of, and not by a name that stands before it: to find it takes one layer, not two.
"""

import math

import numpy as np
from jaxtyping import UInt64

from dsv3_jax.data.documents import Documents

# Fifteen or sixteen Greek, Cyrillic and Latin letters, whose last bytes in UTF-8 differ as well.
_FIRST_AND_LAST = ((0x391, 0x39F), (0x430, 0x43F), (0xE0, 0xEF))
ALPHABETS = tuple("".join(map(chr, range(a, b + 1))) for a, b in _FIRST_AND_LAST)
LEAST, MOST = 1, 256  # lines of text to a needle, on average of a document
FRESH = 0.25  # share of needles that say something new

QUESTION = "# seal "  # where the letters are asked for


def draw(rng: np.random.Generator) -> str:
    """The letters of a needle, one of 3840."""
    return "".join(alphabet[rng.integers(len(alphabet))] for alphabet in ALPHABETS)


class WithNeedles:
    """Documents with needles in their text, the same ones whenever a document is read."""

    def __init__(self, documents: Documents):
        """Takes the documents; nothing is read yet."""
        self._documents, self._hashes = documents, documents.hashes()

    def __len__(self) -> int:
        """The number of documents."""
        return len(self._documents)

    def __getitem__(self, index: int) -> str:
        """One document; raises BadDocument."""
        return scatter(self._documents[index], np.random.default_rng(int(self._hashes[index])))

    def hashes(self) -> UInt64[np.ndarray, " documents"]:
        """Those of the documents."""
        return self._hashes


def scatter(text: str, rng: np.random.Generator) -> str:
    """The lines of a text in their order, and a needle after some of them, at random and independently.

    How many lines there are to a needle is drawn first, log-uniformly from `LEAST` to `MOST`. A needle says
    what the one before said, or new letters with a chance of `FRESH`.
    """
    every = math.exp(rng.uniform(math.log(LEAST), math.log(MOST)))
    letters, parts = draw(rng), []
    for line in text.splitlines(keepends=True):
        parts.append(line)
        if rng.random() < 1 / every and line.endswith("\n"):
            letters = draw(rng) if rng.random() < FRESH else letters
            parts.append(f"{QUESTION}{letters}\n")
    return "".join(parts)
