"""Needles stand between the lines of a document and nowhere else, the same ones whenever it is read."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import corpus, needles
from dsv3_jax.data.documents import Skipped, refuse
from dsv3_jax.data.needles import LETTERS, WithNeedles, draw, scatter
from dsv3_jax.data.text import TextFiles

TEXTS = st.lists(st.text("abc #=1", max_size=12), max_size=300).map("\n".join)
SEEDS = st.integers(0, 2**64 - 1)
LINE = re.compile(f"{needles.QUESTION}[{LETTERS}]\n")


@settings(deadline=None, max_examples=50)
@given(TEXTS, SEEDS)
def test_without_its_needles_a_text_is_what_it_was(text, seed):
    scattered = scatter(text, np.random.default_rng(seed))
    lines = scattered.splitlines(keepends=True)
    assert "".join(line for line in lines if not LINE.fullmatch(line)) == text
    assert scattered.count(needles.QUESTION) == sum(LINE.fullmatch(line) is not None for line in lines)


def test_every_letter_is_drawn_as_often_as_another_and_the_same_one_of_a_seed():
    drawn = [draw(np.random.default_rng(seed)) for seed in range(3200)]
    assert drawn == [draw(np.random.default_rng(seed)) for seed in range(3200)]
    assert set(drawn) == set(LETTERS)
    np.testing.assert_allclose([drawn.count(letter) for letter in LETTERS], 200, atol=70)  # five deviations


def test_letters_differ_in_their_last_byte_alone():
    first, last = zip(*(letter.encode() for letter in LETTERS), strict=True)
    assert len(set(first)) == 1 and len(set(last)) == len(LETTERS) == 16


def test_half_of_the_documents_have_less_than_two_lines_to_a_needle_and_some_have_256():
    lines = "\n" * 4096
    needles_of = [scatter(lines, np.random.default_rng(seed)).count(needles.QUESTION) for seed in range(400)]
    every = 4096 / np.array(needles_of)
    assert every.max() > 200 and every.min() < 1.01
    shares = np.histogram(np.cbrt(np.log2(every) / 8).clip(0, 1), 4, (0, 1))[0] / 400
    np.testing.assert_allclose(shares, 1 / 4, atol=0.09)  # four deviations of a binomial


def test_nine_of_ten_needles_repeat_the_one_before():
    said = [LINE.findall(scatter("\n" * 4096, np.random.default_rng(seed))) for seed in range(40)]
    again = [line == before for lines in said for before, line in pairwise(lines)]
    other = needles.FRESH * 15 / 16  # what is drawn anew may be the same letter
    deviation = (other * (1 - other) / len(again)) ** 0.5
    assert np.mean(again) == pytest.approx(1 - other, abs=4 * deviation)


def test_documents_have_the_same_needles_wherever_their_folder_lies(tmp_path):
    def documents(folder):
        (tmp_path / folder).mkdir()
        files = [tmp_path / folder / name for name in ("a.py", "b.py")]
        for file in files:
            file.write_text("one\ntwo\n" * 500)
        return WithNeedles(TextFiles(tmp_path / folder, files, 10_000))

    here, there = documents("here"), documents("there")
    assert len(here) == 2
    assert [here[0], here[1]] == [there[0], there[1]]
    assert LINE.findall(here[0]) != LINE.findall(here[1]) != []
    np.testing.assert_array_equal(here.hashes(), there.hashes())


def test_the_library_with_needles_is_split_like_the_library_without():
    plain, needled = (
        corpus.open_source(name, "text", 1 << 24, refuse, Skipped())
        for name in (corpus.STDLIB, corpus.NEEDLES)
    )
    np.testing.assert_array_equal(plain.hashes(), needled.hashes())
    assert LINE.sub("", needled[3]) == plain[3]
