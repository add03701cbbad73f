"""Needles stand between the lines of a document and nowhere else, the same ones whenever it is read."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import corpus, needles
from dsv3_jax.data.documents import Skipped, refuse
from dsv3_jax.data.needles import ALPHABETS, WithNeedles, draw, scatter
from dsv3_jax.data.text import TextFiles

TEXTS = st.lists(st.text("abc #=1", max_size=12), max_size=300).map("\n".join)
SEEDS = st.integers(0, 2**64 - 1)
LINE = re.compile(needles.QUESTION + "".join(f"[{letters}]" for letters in ALPHABETS) + "\n")


@settings(deadline=None, max_examples=50)
@given(TEXTS, SEEDS)
def test_without_its_needles_a_text_is_what_it_was(text, seed):
    scattered = scatter(text, np.random.default_rng(seed))
    lines = scattered.splitlines(keepends=True)
    assert "".join(line for line in lines if not LINE.fullmatch(line)) == text
    assert scattered.count(needles.QUESTION) == sum(LINE.fullmatch(line) is not None for line in lines)


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_the_same_seed_draws_the_same_letters_one_of_each_alphabet(seed):
    letters = draw(np.random.default_rng(seed))
    assert letters == draw(np.random.default_rng(seed))
    assert LINE.fullmatch(f"{needles.QUESTION}{letters}\n")


def test_no_letter_shares_a_byte_with_one_of_another_alphabet():
    bytes_of = [set("".join(letters).encode()) for letters in ALPHABETS]
    assert [len(letters) for letters in ALPHABETS] == [15, 16, 16]
    assert not bytes_of[0] & bytes_of[1] and not bytes_of[0] & bytes_of[2] and not bytes_of[1] & bytes_of[2]


def test_each_power_of_two_of_lines_to_a_needle_is_as_usual_as_another():
    lines = "\n" * 4096
    every = [
        4096 / scatter(lines, np.random.default_rng(seed)).count(needles.QUESTION) for seed in range(700)
    ]
    shares = np.histogram(np.log2(every), range(1, 9))[0] / 700
    np.testing.assert_allclose(shares, 1 / 7, atol=0.05)  # four deviations of a binomial


def test_three_of_four_needles_say_what_the_one_before_said():
    said = [LINE.findall(scatter("\n" * 4096, np.random.default_rng(seed))) for seed in range(40)]
    again = [line == before for lines in said for before, line in pairwise(lines)]
    assert np.mean(again) == pytest.approx(1 - needles.FRESH, abs=4 * (0.25 * 0.75 / len(again)) ** 0.5)


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
    assert LINE.findall(here[0])[0] != LINE.findall(here[1])[0]
    np.testing.assert_array_equal(here.hashes(), there.hashes())


def test_the_library_with_needles_is_split_like_the_library_without():
    plain, needled = (
        corpus.open_source(name, "text", 1 << 24, refuse, Skipped())
        for name in (corpus.STDLIB, corpus.NEEDLES)
    )
    np.testing.assert_array_equal(plain.hashes(), needled.hashes())
    assert LINE.sub("", needled[3]) == plain[3]
