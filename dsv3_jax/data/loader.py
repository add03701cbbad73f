"""Training batches, resumable to the row and the same on any number of processes; validation rows."""

import weakref

import numpy as np

from dsv3_jax.data import corpus, fill_in_middle, packing
from dsv3_jax.data.config import Data, Source
from dsv3_jax.data.corpus import Subset
from dsv3_jax.data.documents import Skipped
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.stream import Shard, State, held_out, source_of
from dsv3_jax.data.tokenizer import Tokenizer

__all__ = ["Data", "Loader", "Rows", "Source", "train_loader", "validation_rows"]


class Loader:
    """Rows for one process, from the shards that are its own."""

    def __init__(self, streams: dict[int, Shard], shards: int, origin: State, skipped: Skipped):
        """Takes streams by shard number; made by `train_loader`."""
        self._streams, self._shards, self._origin, self._skipped = streams, shards, origin, skipped
        # Also runs when the interpreter ends: threads that read on while it is torn down print errors.
        self._finish = weakref.finalize(self, _close, streams)

    def next(self, rows: int) -> Rows:
        """The next rows of this process, an equal number from each of its shards.

        The rows of all processes, in their order, are the global batch.

        Returns:
            Arrays [rows, S+1].
        """
        each, rest = divmod(rows, len(self._streams))
        if rest or each < 1:
            raise ValueError(
                f"{rows} rows do not split over the {len(self._streams)} shards of this process "
                f"(config.data.shards={self._shards} in all); choose a batch size that is a multiple of them."
            )
        taken = [next(stream) for stream in self._streams.values() for _ in range(each)]
        return Rows(*map(np.stack, zip(*taken, strict=True)))

    def state(self) -> State:
        """Where this process is: JSON, one entry for each of its shards, and what the stream is made from.

        Merging the states of all processes (`|`) gives the state of the whole.
        """
        return {"stream": self._origin} | {str(k): stream.state() for k, stream in self._streams.items()}

    def restore(self, state: State) -> None:
        """Goes on from a state, of this process or merged from any number of processes.

        Raises:
            ValueError: if the state is of other data, naming what differs, or lacks a shard.
        """
        before = state.get("stream", {})
        differing = [k for k, v in self._origin.items() if before.get(k) != v]
        if differing:
            what = "; ".join(f"{k} was {before.get(k)!r} and is {self._origin[k]!r}" for k in differing)
            raise ValueError(
                f"The data position saved is of another stream of data: {what}. "
                "Restore those settings, or start the data afresh in a new work directory."
            )
        missing = [k for k in self._streams if str(k) not in state]
        if missing:
            raise ValueError(
                f"The data position saved lacks shards {missing} of config.data.shards={self._shards}; "
                "merge the states of all processes that saved it."
            )
        for k, stream in self._streams.items():
            stream.restore(state[str(k)])

    @property
    def skipped(self) -> dict[str, int]:
        """The number of bad documents left out since the start of this process, by reason."""
        return self._skipped.counts()

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._finish()


def train_loader(
    data: Data, tokenizer: Tokenizer, sequence_length: int, index: int = 0, count: int = 1
) -> Loader:
    """Opens the training documents for part `index` of `count` equal parts of every batch.

    Raises:
        ValueError: if shards do not split into these parts, or a source has fewer documents than shards.
    """
    _check(data, tokenizer, sequence_length)
    if data.shards % count:
        raise ValueError(
            f"config.data.shards={data.shards} do not split over {count} processes; "
            f"choose a multiple of {count}."
        )
    skipped = Skipped()
    parts = [training for training, _ in _open(data, skipped)]
    for source, part in zip(data.sources, parts, strict=True):
        if len(part) < data.shards:
            raise ValueError(
                f"{source.path} has {len(part)} training documents for config.data.shards={data.shards}; use "
                f"at most {len(part)} shards, more documents, or a lower config.data.validation_fraction."
            )
    each = data.shards // count
    mine = range(index * each, (index + 1) * each)
    streams = {k: Shard(data, tokenizer, sequence_length, parts, k, skipped) for k in mine}
    return Loader(streams, data.shards, _origin(data, tokenizer, sequence_length, parts), skipped)


def validation_rows(data: Data, tokenizer: Tokenizer, sequence_length: int, rows: int) -> Rows:
    """Validation documents as they are, packed, in the sources' proportions: the same whenever called.

    Returns:
        Arrays [rows, S+1], or fewer rows if there is no more validation text; none if its fraction is 0.

    Raises:
        ValueError: if a fraction is asked for but no document falls into it.
    """
    _check(data, tokenizer, sequence_length)
    skipped = Skipped()
    parts = [part for _, part in _open(data, skipped)]
    if data.validation_fraction and not any(map(len, parts)):
        raise ValueError(
            f"None of the documents falls into config.data.validation_fraction="
            f"{data.validation_fraction}: raise it, give more documents (a text file is one), or set it to 0."
        )
    packed = [held_out(data, tokenizer, sequence_length, part, skipped) for part in parts]
    streams, taken, number = dict(enumerate(packed)), [], 0
    while streams and len(taken) < rows:
        source = source_of(number, [s.weight for s in data.sources])
        number += 1
        if source in streams:
            row = next(streams[source], None)
            if row is None:
                streams.pop(source)
            else:
                taken.append(row)
    empty = np.zeros((0, sequence_length + 1), np.int32)
    return Rows(*map(np.stack, zip(*taken, strict=True))) if taken else Rows(empty, empty)


def _close(streams: dict[int, Shard]) -> None:
    for stream in streams.values():
        stream.close()
    streams.clear()


def _open(data: Data, skipped: Skipped) -> list[tuple[Subset, Subset]]:
    """Training and validation documents of each source."""
    opened = [
        corpus.open_source(s.path, s.text_key, data.max_document_bytes, data.on_bad, skipped)
        for s in data.sources
    ]
    return [corpus.split(documents, data.validation_fraction) for documents in opened]


def _check(data: Data, tokenizer: Tokenizer, sequence_length: int) -> None:
    fill_in_middle.check_rate(data.fill_in_middle_rate, tokenizer)
    if sequence_length < 1:
        raise ValueError(f"config.train.sequence_length={sequence_length} must be at least 1.")


def _origin(data: Data, tokenizer: Tokenizer, sequence_length: int, parts: list[Subset]) -> State:
    """Everything that decides the order and content of rows, except what the files say."""
    return {
        "config.train.sequence_length": sequence_length,
        "config.data.seed": data.seed,
        "config.data.shards": data.shards,
        "config.data.fill_in_middle_rate": data.fill_in_middle_rate,
        "config.data.mask_documents": data.mask_documents,
        "source weights": [s.weight for s in data.sources],
        "training documents": [f"{len(part)}, digest {part.digest():016x}" for part in parts],
        "tokenizer digest": tokenizer.digest,
        "rows open in packing": packing.open_rows(sequence_length + 1),
    }
