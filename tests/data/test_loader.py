"""The loader: the same batches after any interruption and on any number of processes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.data import packing, stream
from dsv3_jax.data.loader import Data, Rows, Source, train_loader, validation_rows

S = 48


def equal(a: Rows, b: Rows) -> bool:
    return a.tokens.tolist() == b.tokens.tolist() and a.segments.tolist() == b.segments.tolist()


def batches(loader, count, rows):
    with_rows = [loader.next(rows) for _ in range(count)]
    loader.close()
    return with_rows


def documents_of(rows: Rows, eos: int) -> list[tuple[int, ...]]:
    """Whole documents, of rows in which none is cut."""
    ids = rows.tokens[rows.segments > 0].tolist()
    found, start = [], 0
    for i, token in enumerate(ids):
        if token == eos:
            found.append(tuple(ids[start : i + 1]))
            start = i + 1
    return found


def test_rows_are_int32_and_one_longer_than_the_sequence(small, data):
    (rows,) = batches(train_loader(data, small, S), 1, 8)
    for array in rows:
        assert array.shape == (8, S + 1) and array.dtype == np.int32
    assert rows.tokens.max() < small.vocab_size
    assert set(np.unique(rows.segments)) <= {0, 1}


@pytest.mark.parametrize("taken", [0, 1, 15, 16, 17, 40])
def test_a_new_loader_goes_on_bit_for_bit_from_a_saved_position(small, data, taken):
    loader = train_loader(data, small, S)
    for _ in range(taken):
        loader.next(8)
    state = json.loads(json.dumps(loader.state()))
    expected = batches(loader, 30, 8)
    resumed = train_loader(data, small, S)
    resumed.next(4)  # a position of its own, which must not matter
    resumed.restore(state)
    assert resumed.state() == state
    assert all(map(equal, batches(resumed, 30, 8), expected))


def test_a_position_can_be_restored_into_the_loader_it_came_from(small, data):
    loader = train_loader(data, small, S)
    loader.next(12)
    state = loader.state()
    expected = loader.next(12)
    loader.next(40)
    loader.restore(state)
    assert equal(loader.next(12), expected)
    loader.close()


def parallel(data, small, count):
    return [train_loader(data, small, S, i, count) for i in range(count)]


def joined(loaders, rows) -> Rows:
    """The global batch."""
    parts = [loader.next(rows // len(loaders)) for loader in loaders]
    return Rows(*map(np.concatenate, zip(*parts, strict=True)))


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(small, data, count):
    alone, many = parallel(data, small, 1), parallel(data, small, count)
    for rows in (8, 4, 12):
        assert equal(joined(alone, rows), joined(many, rows))
    for loader in alone + many:
        loader.close()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_position_moves_to_another_number_of_processes(small, data, before, after):
    first, second = parallel(data, small, before), parallel(data, small, after)
    for _ in range(7):
        joined(first, 8)
    whole = {}
    for loader in first:
        whole |= json.loads(json.dumps(loader.state()))
    for loader in second:
        loader.restore(whole)
    for _ in range(5):
        assert equal(joined(first, 8), joined(second, 8))
    for loader in first + second:
        loader.close()


def test_a_position_that_lacks_shards_is_refused(small, data):
    part = train_loader(data, small, S, 0, 2).state()
    with pytest.raises(ValueError, match=r"lacks shards \[2, 3\] of config.data.shards=4"):
        train_loader(data, small, S).restore(part)


def test_a_position_of_other_data_is_refused_with_what_differs(small, data):
    state = train_loader(data, small, S).state()
    with pytest.raises(ValueError, match="config.data.seed was 7 and is 8"):
        train_loader(replace(data, seed=8), small, S).restore(state)
    with pytest.raises(ValueError, match="sequence_length was 48 and is 49"):
        train_loader(data, small, S + 1).restore(state)


def test_each_epoch_has_every_document_once_in_an_order_of_its_own(small, data, monkeypatch):
    monkeypatch.setattr(packing, "open_rows", lambda length: 1)  # rows are then in the order of the documents
    plain = replace(data, fill_in_middle_rate=0.0, shards=1, validation_fraction=0.0)
    length = 700  # longer than any document, so none is cut
    found = []
    loader = train_loader(plain, small, length)
    while len(found) < 3 * 200:
        found += documents_of(loader.next(1), small.eos)
    loader.close()
    epochs = [found[i : i + 200] for i in (0, 200, 400)]
    assert len(set(epochs[0])) == 200
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_gives_another_order(small, data):
    a, b = (batches(train_loader(replace(data, seed=s), small, S), 1, 8)[0] for s in (1, 2))
    assert not equal(a, b)


def test_rearranging_differs_between_epochs_and_repeats_with_the_seed(small, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "one two three four five six seven"}) + "\n")
    data = Data(sources=(Source(path=str(path)),), fill_in_middle_rate=1.0, validation_fraction=0.0)
    first, second = (batches(train_loader(data, small, S), 1, 20)[0] for _ in range(2))
    assert equal(first, second)
    assert len({tuple(d) for d in documents_of(first, small.eos)}) > 10


def test_rows_come_from_sources_in_proportion_to_their_weights(small, tmp_path):
    paths = []
    for name, length in (("x", 400), ("y", 10), ("z", 60)):  # weights are of rows, whatever the lengths
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": name * length}) + "\n" for _ in range(20)))
    weights = (5.0, 2.0, 1.0)
    sources = tuple(Source(path=str(p), weight=w) for p, w in zip(paths, weights, strict=True))
    data = Data(sources=sources, fill_in_middle_rate=0.0, validation_fraction=0.0, shards=2)
    (rows,) = batches(train_loader(data, small, 30), 1, 400)
    text = [small.decode(r[r > small.pad])[0] for r in rows.tokens]
    shares = [text.count(name) / 400 for name in "xyz"]
    # The golden-ratio sequence of n terms leaves each share within a few in n.
    np.testing.assert_allclose(shares, np.array(weights) / 8, atol=4 / 400)


def test_every_stretch_of_rows_is_mixed():
    taken = np.array([stream.source_of(i, (3.0, 1.0)) for i in range(100_000)])
    shares = taken.reshape(-1, 32).mean(axis=1)
    assert 0.15 < shares.min() and shares.max() < 0.35  # within three rows of 8 in 32


def test_masking_numbers_the_documents_of_a_row(small, data):
    (rows,) = batches(train_loader(replace(data, mask_documents=True), small, 400), 1, 8)
    assert rows.segments.max() > 1
    for tokens, segments in zip(*rows, strict=True):
        last = np.flatnonzero(np.diff(segments))  # the last token of each document in the row
        assert (tokens[last] == small.eos).sum() >= len(last) - 1  # a cut document ends without one


def test_validation_rows_are_fixed_and_bounded(small, data):
    few, all_of_them = validation_rows(data, small, S, 5), validation_rows(data, small, S, 10_000)
    assert few.tokens.shape == (5, S + 1)
    assert 5 < len(all_of_them.tokens) < 1000
    assert equal(few, validation_rows(replace(data, seed=99), small, S, 5))
    assert few.tokens.tolist() == all_of_them.tokens[:5].tolist()
    assert not np.isin(all_of_them.tokens, small.fill).any()


def test_validation_text_is_not_trained_on(small, data):
    plain = replace(data, fill_in_middle_rate=0.0)
    held_out = set(documents_of(validation_rows(plain, small, 700, 1000), small.eos))
    trained = set()
    for rows in batches(train_loader(plain, small, 700), 40, 4):
        trained |= set(documents_of(rows, small.eos))
    assert len(held_out) > 5 and len(trained) > 100
    assert not held_out & trained


def test_a_validation_split_that_is_empty_is_refused_unless_asked_for(small, tmp_path):
    (tmp_path / "one.txt").write_text("a single file of text")
    data = Data(sources=(Source(path=str(tmp_path)),), validation_fraction=0.0)
    assert validation_rows(data, small, S, 4).tokens.shape == (0, S + 1)
    with pytest.raises(ValueError, match="None of the documents .*config.data.validation_fraction=1e-09"):
        validation_rows(replace(data, validation_fraction=1e-9), small, S, 4)


def test_batches_and_processes_that_do_not_split_are_refused(small, data):
    with pytest.raises(ValueError, match="config.data.shards=4 do not split over 3 processes"):
        train_loader(data, small, S, 0, 3)
    with pytest.raises(ValueError, match="6 rows do not split over the 4 shards"):
        train_loader(data, small, S).next(6)
    with pytest.raises(ValueError, match=r"has \d+ training documents for config.data.shards=1000"):
        train_loader(replace(data, shards=1000), small, S)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fill_in_middle_rate", float("nan")),
        ("fill_in_middle_rate", 1.5),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("validation_fraction", 1.0),
        ("shards", 0),
        ("seed", -1),
        ("max_document_bytes", 0),
        ("prefetch_rows", -1),
        ("sources", ()),
    ],
)
def test_a_setting_out_of_range_is_named(data, key, value):
    with pytest.raises(ValueError, match=f"config.data.{key}"):
        replace(data, **{key: value})


def test_all_settings_out_of_range_are_named_at_once(data):
    with pytest.raises(ValueError, match=r"(?s)config\.data\.shards.*config\.data\.seed"):
        replace(data, shards=0, seed=-1)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_gives_no_share_is_refused(weight):
    with pytest.raises(ValueError, match="config.data.sources: stdlib has weight"):
        Source(path="stdlib", weight=weight)
