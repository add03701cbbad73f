"""Streams of text: whatever way tokens are cut, the text is the same and every piece is whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import tokenizer
from dsv3_jax.inference.text import Stream

TEXTS = ["naive na\u00efve \u4f60\u597d \U0001f600 text", "def f(x):\n    return x\n", "\u00e9" * 5]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    return tokenizer.train(TEXTS * 3, 290, path)


def streamed(stream, tokens, cuts):
    pieces, start = [], 0
    for size in cuts:
        pieces.append(stream.push(tokens[start : start + size]))
        start += size
    pieces.append(stream.push(tokens[start:]))
    return [*pieces, stream.finish()]


@settings(deadline=None, max_examples=200)
@given(words=st.text(max_size=30), cuts=st.lists(st.integers(0, 4), max_size=40))
def test_pieces_join_to_the_text_and_split_no_character(text, words, cuts):
    tokens = text.encode(words).tolist()
    pieces = streamed(Stream(text), tokens, cuts)
    assert "".join(pieces) == words
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in words)


@settings(deadline=None, max_examples=200)
@given(
    words=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 3), max_size=30),
)
def test_a_text_ends_before_the_first_stop_string(text, words, stops, cuts):
    stream = Stream(text, stops)
    got = "".join(streamed(stream, text.encode(words).tolist(), cuts))
    places = [place for stop in stops if (place := words.find(stop)) >= 0]
    assert stream.stopped == bool(places)
    # Pieces may complete a longer stop string before an earlier, shorter place is known to be one.
    assert got == stream.text and not any(stop in got for stop in stops)
    assert words.startswith(got) and (not places or len(got) >= min(places))
    if not places:
        assert got == words


def test_bytes_that_never_become_a_character_are_given_at_the_end(text):
    tokens = text.encode("\U0001f600").tolist()[:1]
    stream = Stream(text)
    assert stream.push(tokens) == "" and stream.finish() == "\ufffd"


def test_names_of_control_tokens_are_these_in_a_prompt_alone(text):
    name = tokenizer.SPECIAL[0]
    assert text.encode_marked(f"{name}def f").tolist() == [text.bos, *text.encode("def f").tolist()]
    assert text.bos not in text.encode(f"{name}def f")
