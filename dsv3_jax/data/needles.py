"""Text with a needle in it: a line that has nothing to do with the text, said again from time to time.

A needle is a comment such as `# seal Λжé`, three letters of scripts that source code has no use for. Each
document has one of its own, so that where the line stands again its letters can be told only by looking back.
In some documents it stands after every line and in some after every 256th, any power of two as often as
another. So small a model learns to look back in minutes, as it takes a single layer: the needle is known by
what it is made of, and not by a name that stands before it.
"""

import math

import numpy as np
from jaxtyping import UInt64

from dsv3_jax.data.documents import Documents

# Fifteen or sixteen letters of each: Greek, Cyrillic and Latin ones, whose last bytes in UTF-8 differ as well.
_FIRST_AND_LAST = ((0x391, 0x39F), (0x430, 0x43F), (0xE0, 0xEF))
ALPHABETS = tuple("".join(map(chr, range(a, b + 1))) for a, b in _FIRST_AND_LAST)
LEAST, MOST = 1, 256  # lines of text to a needle, on average of a document


QUESTION = "# seal "  # where the letters are asked for


def draw(rng: np.random.Generator) -> str:
    """The letters of a needle, one of 3840."""
    return "".join(alphabet[rng.integers(len(alphabet))] for alphabet in ALPHABETS)


class WithNeedles:
    """Documents with a needle each, the same ones whenever a document is read."""

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
    """The lines of a text in their order, and one needle after some of them, at random and independently.

    How many lines there are to a needle is drawn first, log-uniformly from `LEAST` to `MOST`.
    """
    needle, lines = f"{QUESTION}{draw(rng)}\n", text.splitlines(keepends=True)
    every = math.exp(rng.uniform(math.log(LEAST), math.log(MOST)))
    here = rng.random(len(lines)) < 1 / every
    return "".join(part + needle * int(put) for part, put in zip(lines, here, strict=True))
