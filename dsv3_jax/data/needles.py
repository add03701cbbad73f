"""Text with needles in it: lines that have nothing to do with the text, and are said again further on.

A needle is a comment such as `# seal Λ`, a letter of a script that source code has no use for. Most
needles say what the one before said, which can be told only by looking back to it. In some documents a needle
stands after every line and in some after every 256th: most are dense, since only there does a small model
learn to look back, and some are sparse, since only there is it far. A needle is known by what it is made of,
and not by a name that stands before it: to find it takes one layer, not two.
"""

import numpy as np
from jaxtyping import UInt64

from dsv3_jax.data.documents import Documents

# Sixteen Greek capitals, which differ in the last byte of their UTF-8 alone.
LETTERS = "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠ"
MOST = 256  # lines of text to a needle, on average of a document
FRESH = 0.1  # share of needles whose letter is drawn anew

QUESTION = "# seal "  # where the letter is asked for


def draw(rng: np.random.Generator) -> str:
    """The letter of a needle, any as often as another."""
    return LETTERS[rng.integers(len(LETTERS))]


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

    How many lines there are to a needle is drawn first, from 1 to `MOST`: the cube root of its logarithm is
    uniform, so that it is below 2 in half of the documents. A needle says what the one before said, or with a
    chance of `FRESH` a letter drawn anew.
    """
    every = MOST ** rng.random() ** 3
    letter, parts = draw(rng), []
    for line in text.splitlines(keepends=True):
        parts.append(line)
        if rng.random() < 1 / every and line.endswith("\n"):
            letter = draw(rng) if rng.random() < FRESH else letter
            parts.append(f"{QUESTION}{letter}\n")
    return "".join(parts)
