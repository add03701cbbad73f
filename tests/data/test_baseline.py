"""Baselines: the same as counted by hand, and true distributions."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import baseline
from dsv3_jax.data.baseline import NgramCounts
from dsv3_jax.data.packing import Rows

quick = settings(deadline=None, database=None, max_examples=60)


def draw(seed, vocab, shape):
    """Rows with padding and several segments."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 3, shape))[:, ::-1]
    segments = np.where(segments > 0, 3 - segments, 0)
    return Rows(rng.integers(0, vocab, shape).astype(np.int32), segments.astype(np.int32))


def by_hand(rows):
    """Targets with the token before, one by one."""
    for tokens, segments in zip(*(r.tolist() for r in rows), strict=True):
        for i in range(1, len(tokens)):
            if segments[i] > 0 and segments[i] == segments[i - 1]:
                yield tokens[i - 1], tokens[i]


@quick
@given(st.integers(0, 2**20), st.integers(2, 9))
def test_cross_entropies_equal_those_counted_by_hand(seed, vocab):
    train, held = draw(seed, vocab, (6, 9)), draw(seed + 1, vocab, (4, 9))
    counts = NgramCounts(vocab)
    counts.add(Rows(train.tokens[:3], train.segments[:3]))
    counts.pairs()  # merging in two steps must not matter
    counts.add(Rows(train.tokens[3:], train.segments[3:]))
    pairs, single = Counter(by_hand(train)), Counter(t for _, t in by_hand(train))
    total = sum(single.values())
    targets = list(by_hand(held))
    unigram = -sum(math.log((single[t] + 1) / (total + vocab)) for _, t in targets) / len(targets)
    assert baseline.unigram_entropy(counts, held) == pytest.approx(unigram, rel=1e-12)

    once, twice = (sum(c == n for c in pairs.values()) for n in (1, 2))
    discount = min(max(once / max(once + 2 * twice, 1), 0.1), 0.9)

    def probability(a, b):
        lower = (sum(y == b for _, y in pairs) + 1) / (len(pairs) + vocab)
        seen = sum(c for (x, _), c in pairs.items() if x == a)
        if not seen:
            return lower
        kinds = sum(x == a for x, _ in pairs)
        return max(pairs[a, b] - discount, 0) / seen + discount * kinds / seen * lower

    bigram = -sum(math.log(probability(a, b)) for a, b in targets) / len(targets)
    assert baseline.bigram_cross_entropy(counts, held) == pytest.approx(bigram, rel=1e-12)


@quick
@given(st.integers(0, 2**20), st.integers(1, 12), st.integers(1, 30))
def test_probabilities_sum_to_one_after_every_token(seed, vocab, max_pairs):
    counts = NgramCounts(vocab, max_pairs)
    counts.add(draw(seed, vocab, (5, 8)))
    after = np.arange(vocab)
    for before in range(vocab):
        sums = baseline.bigram_probabilities(counts, np.full(vocab, before), after).sum()
        assert sums == pytest.approx(1.0, abs=1e-12)


def test_a_bigram_language_is_predicted_by_bigrams_only():
    tokens = np.tile(np.arange(8, dtype=np.int32), (50, 4))
    rows = Rows(tokens, np.ones_like(tokens))
    counts = NgramCounts(8)
    counts.add(rows)
    # The first token of a row is no target, so the counts are a little uneven.
    assert baseline.unigram_entropy(counts, rows) == pytest.approx(math.log(8), rel=0.01)
    assert baseline.bigram_cross_entropy(counts, rows) < 0.01


def test_memory_is_that_of_the_pairs_allowed_and_what_is_forgotten_is_counted():
    counts = NgramCounts(10_000, max_pairs=1000)
    counts.add(draw(0, 10_000, (100, 101)))
    keys, seen = counts.pairs()
    assert len(keys) <= 1000 and counts.forgotten > 1000 and (seen > 1).all()


def test_a_token_outside_the_vocabulary_is_named():
    rows = Rows(np.array([[1, 7]], np.int32), np.ones((1, 2), np.int32))
    with pytest.raises(ValueError, match="Token 7 is outside the vocabulary of 5"):
        NgramCounts(5).add(rows)


def test_rows_without_a_target_are_refused():
    empty = np.zeros((0, 9), np.int32)
    with pytest.raises(ValueError, match="no target to score"):
        baseline.unigram_entropy(NgramCounts(5), Rows(empty, empty))
