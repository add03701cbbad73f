"""Fill-in-the-middle: the parts are those of the document, in PSM order."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import fill_in_middle
from dsv3_jax.data.tokenizer import Tokenizer

quick = settings(deadline=None, database=None, max_examples=60)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100)


def parts(ids, tokenizer):
    """Prefix, suffix and middle, after checking the layout."""
    ids = ids.tolist()
    hole, end = ids.index(tokenizer.fill.hole), ids.index(tokenizer.fill.end)
    assert ids[0] == tokenizer.fill.begin and ids[-1] == tokenizer.eos and 0 < hole < end
    return (tokenizer.decode(p) for p in (ids[1:hole], ids[hole + 1 : end], ids[end + 1 : -1]))


@quick
@given(texts, st.integers(0, 2**32))
def test_parts_reassemble_to_the_document(small, text, seed):
    ids = fill_in_middle.fill_in_middle(text, small, np.random.default_rng(seed))
    prefix, suffix, middle = parts(ids, small)
    assert prefix + middle + suffix == text


def test_each_part_can_be_empty_and_each_can_be_all(small):
    seen = set()
    for seed in range(200):
        ids = fill_in_middle.fill_in_middle("xyz", small, np.random.default_rng(seed))
        seen.add(tuple(map(len, parts(ids, small))))
    assert len(seen) == 10  # all ways to place two cuts in three characters


@quick
@given(texts)
def test_rate_zero_leaves_documents_untouched(small, text):
    ids = fill_in_middle.encoder(0.0)(text, small, np.random.default_rng(0))
    assert ids.tolist() == [*small.encode(text).tolist(), small.eos]


def test_the_rate_is_the_share_of_documents(small):
    encode = fill_in_middle.encoder(0.1)
    marked = sum(
        encode("some text", small, np.random.default_rng(i))[0] == small.fill.begin for i in range(2000)
    )
    assert abs(marked - 200) < 4 * np.sqrt(2000 * 0.1 * 0.9)  # four standard deviations


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(small, rate):
    with pytest.raises(ValueError, match="config.data.fill_in_middle_rate=.* between 0 and 1"):
        fill_in_middle.check_rate(rate, small)


def test_a_tokenizer_without_the_tokens_is_refused(small, tmp_path):
    path = tmp_path / "plain.json"
    path.write_text(Path(small.path).read_text().replace("fim\u2581hole", "unrelated"))
    plain = Tokenizer.load(path)
    fill_in_middle.check_rate(0.0, plain)
    with pytest.raises(ValueError, match="plain.json lacks"):
        fill_in_middle.check_rate(0.1, plain)
