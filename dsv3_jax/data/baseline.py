"""What a model must beat: n-gram models of the same training tokens, on the same validation targets."""

import numpy as np
from jaxtyping import Float, Int64

from dsv3_jax.data.packing import Rows

_MERGE_AT = 1 << 22  # uncounted pairs held before they are sorted into the table


class NgramCounts:
    """Counts of tokens and of pairs of neighbours, at the targets that a training loss is taken at.

    Memory is that of the distinct pairs, of which there are at most `max_pairs`: above that, the
    rarest are forgotten, which `forgotten` counts.
    """

    def __init__(self, vocab: int, max_pairs: int = 1 << 25):
        """Starts at zero; ids are below `vocab`."""
        self.vocab, self.max_pairs, self.forgotten = vocab, max_pairs, 0
        self.tokens = np.zeros(vocab, np.int64)
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []

    def add(self, rows: Rows) -> None:
        """Counts the rows of a batch."""
        before, target = targets(rows)
        largest = max(before.max(initial=0), target.max(initial=0))
        if largest >= self.vocab:
            raise ValueError(
                f"Token {largest} is outside the vocabulary of {self.vocab} that counts were made for; "
                "give NgramCounts the vocabulary of the model."
            )
        self.tokens += np.bincount(target, minlength=self.vocab)
        self._waiting.append(before * self.vocab + target)
        if sum(map(len, self._waiting)) > _MERGE_AT:
            self._merge()

    def pairs(self) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
        """Distinct pairs as first * vocab + second, ascending, and how often each was seen."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *self._waiting])
        weights = np.concatenate([self._counts, np.ones(len(keys) - len(self._keys), np.int64)])
        self._waiting = []
        self._keys, place = np.unique(keys, return_inverse=True)
        # Float sums of counts are exact below 2**53.
        self._counts = np.bincount(place, weights, minlength=len(self._keys)).astype(np.int64)
        rare = 0
        while len(self._keys) > self.max_pairs:
            rare += 1
            kept = self._counts > rare
            self.forgotten += int((~kept).sum())
            self._keys, self._counts = self._keys[kept], self._counts[kept]


def targets(rows: Rows) -> tuple[Int64[np.ndarray, " targets"], Int64[np.ndarray, " targets"]]:
    """The tokens that are predicted, and the token before each: neighbours in one segment, no padding."""
    real = (rows.segments[:, 1:] == rows.segments[:, :-1]) & (rows.segments[:, 1:] > 0)
    return rows.tokens[:, :-1][real].astype(np.int64), rows.tokens[:, 1:][real].astype(np.int64)


def unigram_entropy(counts: NgramCounts, rows: Rows) -> float:
    """Cross-entropy of the targets under training frequencies with one added to each, nats per token."""
    _, target = targets(rows)
    return _mean_nats(_unigram(counts.tokens)[target])


def bigram_cross_entropy(counts: NgramCounts, rows: Rows) -> float:
    """Cross-entropy of the targets under an interpolated Kneser-Ney bigram model, nats per token.

    The strongest of the simple bigram models: an absolute discount from every pair goes to the frequency
    with which a token follows different tokens, and one is added to that (Kneser and Ney, 1995; the discount
    is that of Ney, Essen and Kneser, 1994).
    """
    return _mean_nats(bigram_probabilities(counts, *targets(rows)))


def bigram_probabilities(
    counts: NgramCounts, before: Int64[np.ndarray, " targets"], target: Int64[np.ndarray, " targets"]
) -> Float[np.ndarray, " targets"]:
    """The probability of each target after the token before it; over the vocabulary these sum to one."""
    keys, seen = counts.pairs()
    first, second = keys // counts.vocab, keys % counts.vocab
    totals = np.bincount(first, seen, minlength=counts.vocab)
    followers = np.bincount(first, minlength=counts.vocab)
    lower = _unigram(np.bincount(second, minlength=counts.vocab))
    discount = _discount(seen)
    total = totals[before]
    known = np.maximum(_look_up(keys, seen, before * counts.vocab + target) - discount, 0.0)
    # After a token that was never seen, only the lower order speaks.
    share = np.where(total > 0, discount * followers[before] / np.maximum(total, 1), 1.0)
    return known / np.maximum(total, 1) + share * lower[target]


def _unigram(seen: np.ndarray) -> Float[np.ndarray, " W"]:
    return (seen + 1.0) / (seen.sum() + len(seen))


def _discount(seen: np.ndarray) -> float:
    """From the number of pairs seen once and twice; kept off 0 and 1, where tiny counts would put it."""
    once, twice = int((seen == 1).sum()), int((seen == 2).sum())
    return min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each key wanted, 0 where it is absent."""
    if not len(keys):
        return np.zeros(len(wanted))
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _mean_nats(probabilities: np.ndarray) -> float:
    if not len(probabilities):
        raise ValueError(
            "The rows hold no target to score: give rows of at least two tokens of one document, for "
            "example by raising config.data.validation_fraction."
        )
    return float(-np.log(probabilities).mean())
