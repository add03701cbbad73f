"""Documents to rows of equal length, best-fit (arXiv:2412.19437, section 4.1; arXiv:2404.10830)."""

from collections.abc import Callable
from typing import NamedTuple

import grain
import numpy as np
from grain import experimental
from jaxtyping import Int32

from dsv3_jax.data.tokenizer import Tokenizer

# Tokens in the rows open at a time, 1024 rows of 256. Rows are shuffled among them: a long document fills
# many rows, which should not follow each other in training. Restoring a position repeats at most this much.
OPEN_TOKENS = 1 << 18
_LEAST_OPEN_ROWS = 64  # fewer leave more of each row empty


class Rows(NamedTuple):
    """Packed rows: of length S+1, one token more than the sequence has positions, for the shifted targets.

    Attributes:
        tokens: ids; padding is at the end of a row.
        segments: 0 for padding; tokens with equal positive numbers see each other.
    """

    tokens: Int32[np.ndarray, "*rows length"]
    segments: Int32[np.ndarray, "*rows length"]


Visible = Callable[[Int32[np.ndarray, " length"]], Int32[np.ndarray, " length"]]


def shared(segments: Int32[np.ndarray, " length"]) -> Int32[np.ndarray, " length"]:
    """Lets documents in a row see each other, as the report does."""
    return np.minimum(segments, 1)


def masked(segments: Int32[np.ndarray, " length"]) -> Int32[np.ndarray, " length"]:
    """Keeps the documents in a row apart."""
    return segments


def pack(
    documents: grain.IterDataset, length: int, tokenizer: Tokenizer, visible: Visible, seed: int
) -> grain.IterDataset:
    """Packs arrays of ids into rows.

    A document longer than a row is cut into full rows and a rest. Each piece goes to the open row that it
    leaves least room in; when one fits nowhere, all open rows are emitted in shuffled order.

    Args:
        documents: int32 arrays.
        length: tokens in a row, S+1.
        visible: `shared` or `masked`.

    Returns:
        Rows of shape [length], with a state that resumes exactly.
    """
    cut = experimental.FlatMapIterDataset(documents, _Cut(length))
    rows = experimental.BestFitPackIterDataset(
        cut,
        length_struct={"tokens": length},
        num_packing_bins=open_rows(length),
        padding_struct={"tokens": tokenizer.pad},
        seed=seed,
    )
    return rows.map(lambda row: Rows(row["tokens"], visible(row["tokens_segment_ids"])))


def open_rows(length: int) -> int:
    """How many rows of a length are packed and shuffled together."""
    return max(OPEN_TOKENS // length, _LEAST_OPEN_ROWS)


class _Cut(experimental.FlatMapTransform):
    """A document as pieces of at most a row."""

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: Int32[np.ndarray, " tokens"]) -> list[dict[str, np.ndarray]]:
        return [{"tokens": element[i : i + self._length]} for i in range(0, len(element), self._length)]
