"""The data part of a run's configuration."""

import math
from dataclasses import dataclass

from dsv3_jax.data import corpus
from dsv3_jax.data.documents import OnBad, refuse


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, and the share of rows they make up relative to the other sources."""

    path: str  # "stdlib", "stdlib+needles", a file, a folder or a glob
    weight: float = 1.0
    text_key: str = "text"  # of JSONL objects and Parquet tables

    def __post_init__(self):
        """Refuses a weight that gives no share."""
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"config.data.sources: {self.path} has weight={self.weight}, which must be above 0; "
                "leave out a source that is not wanted."
            )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on, and in which order.

    Attributes:
        shards: independent streams that a batch is made of; a multiple of the number of processes. The
            batches depend on it, and not on the number of processes.
    """

    sources: tuple[Source, ...] = (Source(path=corpus.STDLIB),)
    fill_in_middle_rate: float = 0.1
    mask_documents: bool = False  # the report lets the documents in a row see each other
    validation_fraction: float = 0.02
    shards: int = 1
    seed: int = 0
    on_bad: OnBad = refuse
    max_document_bytes: int = 1 << 24
    prefetch_rows: int = 64  # made ahead by a thread for each shard and source

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        wrong = []
        if not self.sources:
            wrong.append("config.data.sources is empty; name at least one source.")
        for key in ("fill_in_middle_rate", "validation_fraction"):
            if not 0 <= getattr(self, key) <= 1:  # false for NaN
                wrong.append(f"config.data.{key}={getattr(self, key)} must be between 0 and 1.")
        if self.validation_fraction == 1:
            wrong.append("config.data.validation_fraction=1 leaves nothing to train on; 0.02 is usual.")
        for key, least in (("shards", 1), ("seed", 0), ("max_document_bytes", 1), ("prefetch_rows", 0)):
            if getattr(self, key) < least:
                wrong.append(f"config.data.{key}={getattr(self, key)} must be at least {least}.")
        if wrong:
            raise ValueError("\n".join(wrong))
