"""Packing: every token once, in order, in rows of one length."""

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import packing

quick = settings(deadline=None, database=None, max_examples=40)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=120)


def documents(sizes):
    """Arrays of ids that occur nowhere else, from 10."""
    ends = np.cumsum(sizes) + 10
    return [np.arange(end - size, end, dtype=np.int32) for end, size in zip(ends, sizes, strict=True)]


def packed(docs, length, tokenizer, visible):
    source = grain.MapDataset.source(docs).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    return list(packing.pack(source, length, tokenizer, visible, seed=3))


@quick
@given(lengths, st.integers(2, 17))
def test_every_token_is_in_one_row_and_pieces_stay_whole(small, sizes, length):
    docs = documents(sizes)
    pieces = [d[i : i + length].tolist() for d in docs for i in range(0, len(d), length)]
    found = []
    for row in packed(docs, length, small, packing.masked):
        assert row.tokens.shape == row.segments.shape == (length,)
        assert row.tokens.dtype == row.segments.dtype == np.int32
        real = row.segments > 0
        assert (row.tokens[~real] == small.pad).all()
        assert (np.diff(real.astype(int)) <= 0).all()  # padding is at the end
        for segment in range(1, row.segments.max() + 1):
            found.append(row.tokens[row.segments == segment].tolist())
    assert sorted(found) == sorted(pieces)


def test_shared_rows_differ_from_masked_ones_in_segments_only(small):
    docs = documents([5, 9, 3, 30, 2, 2, 7])
    apart, together = (packed(docs, 12, small, v) for v in (packing.masked, packing.shared))
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(np.minimum(a.segments, 1), b.segments)
    assert max(a.segments.max() for a in apart) > 1


def test_a_piece_goes_where_it_leaves_least_room(small):
    rows = packed(documents([6, 8, 2]), 10, small, packing.masked)
    assert sorted((r.segments > 0).sum() for r in rows) == [6, 10]


def test_documents_with_a_row_of_room_are_not_cut(small):
    sizes = np.random.default_rng(0).integers(1, 33, size=500)
    rows = packed(documents(sizes), 32, small, packing.masked)
    assert sum(r.segments.max() for r in rows) == len(sizes)
    next_fit, room = 1, 32
    for size in sizes:
        next_fit, room = (next_fit, room - size) if size <= room else (next_fit + 1, 32 - size)
    least = sizes.sum() / 32
    assert len(rows) - least < (next_fit - least) / 2  # rows that filling one after another wastes
