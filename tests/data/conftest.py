"""Small documents and a small tokenizer that the data tests share."""

import json

import pytest

from dsv3_jax.data import packing, tokenizer
from dsv3_jax.data.loader import Data, Source

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


def document(number: int) -> str:
    """Short or long, and different for each number."""
    count = 3 + (number * 37) % 90
    return " ".join(f"{WORDS[(number * 7 + i * i) % len(WORDS)]}{number}" for i in range(count)) + "\n"


@pytest.fixture(autouse=True)
def few_open_rows(monkeypatch):
    """A small window of packing, so that tests cross its end often and fill it fast."""
    monkeypatch.setattr(packing, "OPEN_TOKENS", 1)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> tokenizer.Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return tokenizer.train(map(document, range(50)), 400, path)


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    """A JSONL file of 200 documents."""
    path = tmp_path_factory.mktemp("lines") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document(i)}) + "\n" for i in range(200)))
    return path


@pytest.fixture(scope="session")
def data(lines) -> Data:
    return Data(
        sources=(Source(path=str(lines)),), fill_in_middle_rate=0.3, validation_fraction=0.1, shards=4, seed=7
    )
