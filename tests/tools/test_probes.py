"""Loss by position and recall are what counting one by one gives, and questions hold what they ask for."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import P

from dsv3_jax import ops
from dsv3_jax.data import needles, tokenizer
from dsv3_jax.data.packing import Rows
from dsv3_jax.model.model import Model
from dsv3_jax.pipeline.objective import Batch, targets
from tests.conftest import SMALL, mesh_of
from tools import probes
from tools.probe_report import Measured, Scale, draw, table
from tools.probes import Haystack, Question, Subject

EDGES = [0, 8, 16, 32]


@pytest.fixture(scope="module")
def subject():
    with jax.set_mesh(mesh_of(1, 1)):
        init = partial(Model.init, c=SMALL, std=0.1)
        bias = jnp.zeros((SMALL.balanced_layers, SMALL.experts), out_sharding=P())
        yield Subject(jax.jit(init)(jax.random.key(0)), bias, SMALL, ops.float32())


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (3, 33)), axis=1)[:, ::-1]  # padding at the end
    return Rows(rng.integers(0, SMALL.vocab, (3, 33), np.int32), np.ascontiguousarray(segments, np.int32))


def test_loss_by_position_is_that_of_single_positions(subject, rows, monkeypatch):
    monkeypatch.setattr(probes, "AT_ONCE", 64)  # so that the rows go in two parts
    scores = probes.log_probabilities(subject, rows)
    got = probes.loss_by_position(scores, np.asarray(targets(Batch(*rows))), EDGES)
    sums, counts = np.zeros(3), np.zeros(3)
    alone = Rows(*(x[:, None] for x in rows))
    for row in range(3):
        single = probes.log_probabilities(subject, Rows(alone.tokens[row], alone.segments[row]))[0]
        for position in range(32):
            here, after = rows.segments[row, position : position + 2]
            if here == after != 0:
                bucket = next(n for n in range(3) if position < EDGES[n + 1])
                sums[bucket] -= single[position]
                counts[bucket] += 1
    np.testing.assert_allclose(got, sums / counts, rtol=1e-5)  # FP32


def test_recall_counts_answers_that_are_likelier_than_not(subject, monkeypatch):
    questions = [Question(np.arange(n, n + 6, dtype=np.int32), 2) for n in range(4)]
    scores = np.full((4, 8), -9.0)
    # Of six tokens the last two are the answer, told by positions 3 and 4.
    scores[:, 3:5] = np.log([[0.8, 0.7], [0.8, 0.6], [1.0, 0.4], [0.49, 1.0]])
    monkeypatch.setattr(probes, "log_probabilities", lambda *_: scores)
    assert probes.recall(subject, questions, 8) == 0.25


TEXT = (
    "".join(f"{'  ' * (n % 3)}line {n} of {n * n}\n" for n in range(60))
    + f"{needles.QUESTION}x\n"
    + "a" * 900
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tokenizer.train([TEXT], 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@settings(deadline=None, max_examples=40)
@given(length=st.integers(60, 700), depth=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_question_fits_and_asks_for_the_one_needle_in_it_where_it_should_stand(text, length, depth, seed):
    question = Haystack(TEXT, text).question(length, depth, np.random.default_rng(seed))
    letter = needles.draw(np.random.default_rng(seed))
    assert len(question.tokens) <= length + 1
    assert text.decode(question.tokens[-question.answer :]) == letter
    before, after, rest = text.decode(question.tokens).split(f"{needles.QUESTION}{letter}")
    assert rest == "" and needles.QUESTION not in before + after
    longest = 40  # tokens of a line of this text at most, in 300 words
    sizes = [len(text.encode(part)) for part in (before, after)]
    assert sum(sizes) >= 0.85 * (length - 60) - longest  # lines together take fewer tokens than one by one
    assert abs(sizes[0] - depth * sum(sizes)) <= longest + 0.1 * length


def test_a_length_without_room_for_the_needle_is_refused(text):
    with pytest.raises(ValueError, match="need more than length=5"):
        Haystack(TEXT, text).question(5, 0.5, np.random.default_rng(0))


MEASURED = [
    Measured("short", [2.0, 4.5], np.array([[1.0, 0.5], [0.0, 0.0]])),
    Measured("long", [1.9, 1.75], np.array([[1.0, 1.0], [1.0, 0.5]])),
]
SCALE = Scale([0, 128, 256], [128, 256], [0.0, 1.0])


def test_the_table_has_a_loss_for_each_bucket_and_a_share_for_each_length():
    assert table(MEASURED, SCALE) == [
        "| loss at positions | 0..127 | 128..255 |",
        "| --- | --- | --- |",
        "| short | 2.000 | 4.500 |",
        "| long | 1.900 | 1.750 |",
        "",
        "| needles found within | 128 | 256 |",
        "| --- | --- | --- |",
        "| short | 75% | 0% |",
        "| long | 100% | 75% |",
    ]


def test_the_picture_is_one(tmp_path):
    draw(tmp_path / "a.png", MEASURED, SCALE)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
