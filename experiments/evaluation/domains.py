"""Which experts the tokens of a kind of text visit (arXiv:2412.19437, figure 9).

The relative load of an expert is how often it was chosen over how often it would be if all were chosen alike,
so that the loads of a layer have mean 1 and sum to the number of experts.
"""

import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.data import corpus
from dsv3_jax.data.config import Data
from dsv3_jax.data.documents import BadDocument, Documents, Skipped, skip
from experiments.evaluation.library import docstrings, is_code
from experiments.scoring import Scorer

Texts = Iterator[str]


class Load(NamedTuple):
    """How often the tokens of a domain chose each expert, K of every routed layer each."""

    tokens: int
    chosen: Int[np.ndarray, "R E"]

    @property
    def relative(self) -> Float[np.ndarray, "R E"]:
        """Actual over balanced load."""
        return self.chosen * (self.chosen.shape[1] / self.chosen.sum(axis=1, keepdims=True))


def loads(
    scorer: Scorer,
    domains: Mapping[str, Iterable[str]],
    encode: Callable[[str], Int[np.ndarray, " n"]],
    most: int,
    length: int,
) -> dict[str, Load]:
    """The loads of domains.

    Args:
        encode: gives the tokens of a text, its end among them.
        most: tokens of a domain; reading ends there.
        length: positions that are looked at together.

    Raises:
        ValueError: if a domain has no text.
    """
    return {name: _load(scorer, _lines(texts, encode, most, length), name) for name, texts in domains.items()}


def _load(scorer: Scorer, lines: list[Int[np.ndarray, " n"]], name: str) -> Load:
    tokens = sum(len(line) - 1 for line in lines)
    if not tokens:
        raise ValueError(f"The domain {name} has no text: give it a file, folder or glob that has some.")
    return Load(tokens, scorer.expert_load(lines))


def _lines(texts: Iterable[str], encode: Callable, most: int, length: int) -> list[Int[np.ndarray, " n"]]:
    """Sequences whose tokens but the last are looked at, each once."""
    lines: list[Int[np.ndarray, " n"]] = []
    for text in texts:
        tokens = encode(text)[: most + 1]
        lines += [tokens[at : at + length + 1] for at in range(0, len(tokens) - 1, length)]
        most -= len(tokens) - 1
        if most <= 0:
            break
    return lines


def of_library() -> dict[str, Texts]:
    """Kinds of the standard library's text, as far as this Python has them."""
    root = Path(sysconfig.get_path("stdlib"))
    places = {"code pages": "encodings/*.py", "tests": "test/test_*.py"}
    more = {name: of(str(root / place)) for name, place in places.items() if any(root.glob(place))}
    return {"code": of(corpus.STDLIB), "docstrings": _docstrings(of(corpus.STDLIB)), **more}


def of(path: str) -> Texts:
    """The texts of a file, folder or glob, those that can be read, in an order that does not follow names.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    skipped = Skipped()
    documents = corpus.open_source(path, "text", Data().max_document_bytes, skip, skipped)
    order = np.argsort(documents.hashes(), kind="stable")
    return _read(documents, order, skipped)


def _read(documents: Documents, order: Int[np.ndarray, " n"], skipped: Skipped) -> Texts:
    for n in order:
        try:
            yield documents[int(n)]
        except BadDocument as bad:
            skip(bad, skipped)


def _docstrings(texts: Texts) -> Texts:
    return chain.from_iterable(docstrings(text) for text in texts if is_code(text))
