"""Streams of packed rows: endless ones for training that resume exactly, finite ones for validation."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from dsv3_jax.data import fill_in_middle, packing
from dsv3_jax.data.config import Data
from dsv3_jax.data.corpus import Subset
from dsv3_jax.data.documents import BadDocument, OnBad, Skipped
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.tokenizer import Tokenizer

State = dict[str, Any]

# All work is done by one prefetch thread a stream; reading documents in more threads gains nothing.
_IN_THIS_THREAD = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Shard:
    """Every n-th training document of each source, shuffled anew each epoch, without end.

    Sources are packed apart and take turns by row, so that weights are shares of tokens whatever the
    lengths of the documents.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: Tokenizer,
        sequence_length: int,
        parts: Sequence[Subset],
        shard: int,
        skipped: Skipped,
    ):
        """Takes the training documents of each source; nothing is read yet."""
        self._weights = [s.weight for s in data.sources]
        self._shard, self._shards, self._rows = shard, data.shards, 0
        self._sources = [
            iter(_training(data, tokenizer, sequence_length, part, (source, shard), skipped))
            for source, part in enumerate(parts)
        ]

    def __next__(self) -> Rows:
        """One row of [S+1]."""
        row = self._rows * self._shards + self._shard
        self._rows += 1
        return next(self._sources[source_of(row, self._weights)])

    def state(self) -> State:
        """The position after the last row taken, as JSON."""
        return {"rows": self._rows, "sources": [s.get_state() for s in self._sources]}

    def restore(self, state: State) -> None:
        """Goes on from a position."""
        self._rows = state["rows"]
        for source, position in zip(self._sources, state["sources"], strict=True):
            source.set_state(position)

    def close(self) -> None:
        """Ends the prefetch threads."""
        for source in self._sources:
            source.close()


def held_out(
    data: Data, tokenizer: Tokenizer, sequence_length: int, part: Subset, skipped: Skipped
) -> Iterator[Rows]:
    """Rows of the validation documents of a source, once, as they are."""
    read = _Readable(part, data.on_bad, skipped)
    encoded = grain.MapDataset.source(read).map(lambda d: fill_in_middle.whole(d[1], tokenizer))
    documents = encoded.to_iter_dataset(_IN_THIS_THREAD)
    return iter(packing.pack(documents, sequence_length + 1, tokenizer, _visible(data), seed=0))


def source_of(row: int, weights: Sequence[float]) -> int:
    """The source of a row of the global stream.

    Multiples of the golden ratio, modulo 1, are spread evenly over any stretch of rows, so every batch has
    the sources in nearly their proportions without a random generator to save.
    """
    turn = (row * 0x9E3779B97F4A7C15 % 2**64) / 2**64
    return min(int(np.searchsorted(np.cumsum(weights), turn * sum(weights), side="right")), len(weights) - 1)


def _training(
    data: Data,
    tokenizer: Tokenizer,
    sequence_length: int,
    part: Subset,
    place: tuple[int, int],
    skipped: Skipped,
) -> grain.IterDataset:
    source, shard = place
    own = Subset(part.documents, part.indices[shard :: data.shards])
    seed = (data.seed, source, shard)
    encode = fill_in_middle.encoder(data.fill_in_middle_rate)

    def tokens(visit: tuple[int, tuple[int, str]]) -> np.ndarray:
        epoch, (index, text) = visit
        return encode(text, tokenizer, np.random.default_rng((data.seed, source, index, epoch)))

    epochs = _Epochs(_Readable(own, data.on_bad, skipped), seed)
    documents = grain.MapDataset.source(epochs).map(tokens).to_iter_dataset(_IN_THIS_THREAD)
    row_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    rows = packing.pack(documents, sequence_length + 1, tokenizer, _visible(data), row_seed)
    return experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=data.prefetch_rows)


def _visible(data: Data) -> packing.Visible:
    return packing.masked if data.mask_documents else packing.shared


class _Epochs:
    """Documents again and again, each time in another order that the seed decides.

    grain's own shuffle needs no memory, but takes milliseconds a document where there are few.
    """

    def __init__(self, documents: "_Readable", seed: tuple[int, ...]):
        self._documents, self._seed = documents, seed
        self._order = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Any:
        epoch, place = divmod(index, len(self._documents))
        if self._order[0] != epoch:
            order = np.random.default_rng((*self._seed, epoch, 1)).permutation(len(self._documents))
            self._order = epoch, order
        document = self._documents[int(self._order[1][place])]
        return None if document is None else (epoch, document)


class _Readable:
    """Documents with their numbers; None for a bad one that is skipped."""

    def __init__(self, part: Subset, on_bad: OnBad, skipped: Skipped):
        self._part, self._on_bad, self._skipped = part, on_bad, skipped
        self._bad_in_a_row = 0

    def __len__(self) -> int:
        return len(self._part)

    def __getitem__(self, index: int) -> Any:
        try:
            text = self._part[index]
        except BadDocument as bad:
            self._on_bad(bad, self._skipped)
            self._bad_in_a_row += 1
            # From a good document in one epoch to it in the next are fewer than two epochs.
            if self._bad_in_a_row > 2 * len(self):
                raise ValueError(
                    f"All {len(self)} documents of a shard are bad, the last one {bad.where} "
                    f"({bad.problem}); repair the source or remove it from config.data.sources."
                ) from bad
            return None
        self._bad_in_a_row = 0
        return int(self._part.indices[index]), text
