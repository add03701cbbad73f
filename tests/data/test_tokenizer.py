"""Tokenizers: nothing is lost, control tokens cannot come from text, training repeats exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data import tokenizer
from dsv3_jax.data.tokenizer import PIECE, SPECIAL, Tokenizer, pieces

quick = settings(deadline=None, database=None, max_examples=60)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@quick
@given(texts)
def test_any_text_comes_back_unchanged(small, text):
    ids = small.encode(text)
    assert ids.dtype == np.int32
    assert small.decode(ids) == text


@pytest.mark.parametrize("name", SPECIAL)
def test_names_of_control_tokens_in_text_stay_text(small, name):
    text = f"before {name} after{name}"
    ids = small.encode(text)
    assert ids.min() >= len(SPECIAL)
    assert small.decode(ids) == text


def test_control_tokens_that_a_file_does_not_mark_as_special_stay_text_too(small, tmp_path):
    spec = json.loads(Path(small.path).read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    path = tmp_path / "released.json"
    path.write_text(json.dumps(spec))
    released = Tokenizer.load(path)
    assert released.fill == small.fill
    assert released.encode("".join(SPECIAL)).min() >= len(SPECIAL)


def test_ids_of_control_tokens_are_found_by_name(small):
    assert (small.bos, small.eos, small.pad, tuple(small.fill)) == (0, 1, 2, (3, 4, 5))
    assert small.decode([small.eos]) == "<\uff5cend\u2581of\u2581sentence\uff5c>"


def test_a_tokenizer_without_fill_in_the_middle_tokens_has_none(small, tmp_path):
    text = Path(small.path).read_text().replace("fim\u2581hole", "unrelated")
    (tmp_path / "t.json").write_text(text)
    assert Tokenizer.load(tmp_path / "t.json").fill is None


def test_two_trainings_write_the_same_file(tmp_path):
    documents = [f"def f{i}(x):\n    return x + {i * i}\n" * 5 for i in range(300)]
    first, second = (tokenizer.train(documents, 500, tmp_path / f"{n}.json") for n in "ab")
    assert first.digest == second.digest
    assert first.vocab_size == 500


def test_the_default_tokenizer_is_trained_once_and_reused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "_SAMPLE_BYTES", 200_000)
    made = tokenizer.default_tokenizer(tmp_path, 600)
    monkeypatch.setattr(tokenizer, "train", None)
    assert tokenizer.default_tokenizer(tmp_path, 600).digest == made.digest
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer-600.json"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        tokenizer.train(["text"], 300, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_a_token_outside_the_model_is_named(small, tmp_path):
    small.check_fits(small.vocab_size)
    spec = json.loads(Path(small.path).read_text())
    spec["added_tokens"].append(dict(spec["added_tokens"][0], id=10**6, content="<huge>"))
    path = tmp_path / "huge.json"
    path.write_text(json.dumps(spec))
    huge = Tokenizer.load(path)
    last = huge.vocab_size - 1
    with pytest.raises(
        ValueError, match=rf"huge\.json: token '.+' has id {last}, but config\.model\.vocab is {last}"
    ):
        huge.check_fits(last)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="bad.json is not a tokenizer.json"):
        Tokenizer.load(path)


def test_an_absent_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json: .*tools.train_tokenizer"):
        Tokenizer.load(tmp_path / "absent.json")


def test_a_file_without_an_end_of_document_token_is_refused(small, tmp_path):
    (tmp_path / "t.json").write_text(
        Path(small.path).read_text().replace("end\u2581of\u2581sentence", "stop")
    )
    with pytest.raises(ValueError, match="no token that ends a document"):
        Tokenizer.load(tmp_path / "t.json")


def test_truncation_asked_for_by_a_file_loses_no_text(small, tmp_path):
    spec = json.loads(Path(small.path).read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    text = "far more than four tokens of text " * 3
    assert Tokenizer.load(tmp_path / "t.json").encode(text).tolist() == small.encode(text).tolist()


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="256 bytes and 6 control tokens; ask for at least 262"):
        tokenizer.train(["text"], 261, tmp_path / "t.json")


@quick
@given(st.text("ab\n \u00e9", max_size=300), st.integers(1, 20))
def test_pieces_join_to_the_text_and_keep_the_limit(text, size):
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    assert all(0 < len(piece) <= size for piece in cut)


def test_long_documents_have_the_tokens_of_the_whole(small):
    text = "".join(f"    if alpha{i}:\n\n        beta = gamma{i}\n" for i in range(4000))
    assert len(text) > 2 * PIECE
    whole = small._text.encode(text, add_special_tokens=False).ids
    assert small.encode(text).tolist() == whole
