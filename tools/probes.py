"""How well a model uses a long context: its loss by position, and needles found in a haystack.

Both read the log-probabilities of the training pass. Nothing here knows how a model came to be.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int32

from dsv3_jax.config import Config
from dsv3_jax.data import needles
from dsv3_jax.data.packing import Rows
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.ops import Ops
from dsv3_jax.pipeline import execute
from experiments.batches import validation_batch

AT_ONCE = 1 << 14  # tokens of a micro-batch

_score = jax.jit(execute.score, static_argnames=("c", "ops"))


class Subject(NamedTuple):
    """A model that is looked at: weights, and the sizes that it is run with."""

    model: object
    bias: jax.Array
    c: Config
    ops: Ops


class Question(NamedTuple):
    """A row that ends with the letter of a needle, which stands somewhere before in the same row."""

    tokens: Int32[np.ndarray, " tokens"]
    answer: int  # tokens of the letter, at the end of the row


def log_probabilities(subject: Subject, rows: Rows) -> Float[np.ndarray, "rows S"]:
    """log p of the token after each position, in nats."""
    count, length = len(rows.tokens), rows.tokens.shape[1] - 1
    batch = validation_batch(rows, max(1, AT_ONCE // length))
    scores = _score(subject.model, subject.bias, batch, c=subject.c, ops=subject.ops)
    return np.asarray(scores.logprobs).reshape(-1, length)[:count]


def loss_by_position(
    scores: Float[np.ndarray, "rows S"], counted: Bool[np.ndarray, "rows S"], edges: Sequence[int]
) -> list[float]:
    """The mean of -log p over the counted positions of each bucket, from one edge up to the next."""
    pairs = zip(edges, edges[1:], strict=False)
    return [float(-np.mean(scores[:, a:b][counted[:, a:b]], dtype=np.float64)) for a, b in pairs]


def recall(subject: Subject, questions: Sequence[Question], length: int) -> float:
    """The share of questions whose letter the model holds for likelier than all others together.

    Such a letter has a probability above one half, token by token too, so that greedy text says it.
    """
    rows = Rows(*(np.zeros((len(questions), length + 1), np.int32) for _ in range(2)))
    for n, question in enumerate(questions):
        rows.tokens[n, : len(question.tokens)] = question.tokens
        rows.segments[n, : len(question.tokens)] = 1
    scores = log_probabilities(subject, rows)
    ends = [len(question.tokens) - 1 for question in questions]
    sums = [
        scores[n, end - q.answer : end].sum() for n, (q, end) in enumerate(zip(questions, ends, strict=True))
    ]
    return float(np.mean(np.array(sums) > np.log(0.5)))


class Haystack:
    """Text to hide needles in, as lines without any, with their lengths in tokens."""

    def __init__(self, text: str, tokenizer: Tokenizer, longest: int = 64):
        """Takes a text, without its lines of more than `longest` tokens, which would leave rows too empty."""
        lines = [line for line in text.splitlines(keepends=True) if needles.QUESTION not in line]
        sizes = [len(tokenizer.encode(line)) for line in lines]
        self._tokenizer = tokenizer
        self._lines = [(line, n) for line, n in zip(lines, sizes, strict=True) if n <= longest]

    def question(self, length: int, depth: float, rng: np.random.Generator) -> Question:
        """A row of at most `length` + 1 tokens, from a random place of the text on.

        Args:
            length: tokens.
            depth: share of the text that stands before the needle, from 0 to 1.
            rng: chooses needle and place.
        """
        encode, letter = self._tokenizer.encode, needles.draw(rng)
        line = f"{needles.QUESTION}{letter}\n"
        room = length + 1 - len(encode(line + line))
        if room < 0:
            raise ValueError(f"A needle and its question need more than length={length}: ask for more.")
        lines = self._from(int(rng.integers(len(self._lines))))
        before, left = self._filled(lines, round(depth * room))
        after, _ = self._filled(lines, room - round(depth * room) + left)
        while True:
            tokens = encode("".join((*before, line, *after, line.rstrip())))
            if len(tokens) <= length + 1:
                return Question(tokens, len(encode(letter)))
            (after or before).pop()  # lines that are encoded together may take more tokens than one by one

    def _from(self, start: int) -> Iterator[tuple[str, int]]:
        """All lines in turn, without end."""
        while True:
            yield self._lines[start]
            start = (start + 1) % len(self._lines)

    def _filled(self, lines: Iterator[tuple[str, int]], room: int) -> tuple[list[str], int]:
        """Lines for at most `room` tokens, and the room left; the line that does not fit is dropped."""
        taken = []
        for line, size in lines:
            if size > room:
                return taken, room
            taken.append(line)
            room -= size
        raise AssertionError("the lines do not end")


def grid(
    subject: Subject,
    haystack: Haystack,
    lengths: Sequence[int],
    depths: Sequence[float],
    needles: int,
) -> Float[np.ndarray, "lengths depths"]:
    """Recall by length of the context and depth of the needle, the same questions for every subject."""

    def cell(length: int, depth: float) -> float:
        rng = np.random.default_rng([length, round(1000 * depth)])
        questions = [haystack.question(length, depth, rng) for _ in range(needles)]
        return recall(subject, questions, length)

    return np.array([[cell(length, depth) for depth in depths] for length in lengths])
