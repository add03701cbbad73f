"""`python -m experiments.perplexity`: every token once, in the context that is promised."""

import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import ops
from dsv3_jax.data.documents import BadDocument, Skipped, refuse, skip
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.pipeline import execute
from experiments.evaluation.perplexity import Figures, Reader, measure, windows
from experiments.scoring import Scorer
from tests.conftest import mesh_of
from tests.experiments.conftest import WORDS

TEXTS = [WORDS, "na\u00efve fox " * 9, "a"]
LENGTH, STRIDE = 12, 5


@settings(deadline=None)
@given(size=st.integers(0, 60), length=st.integers(1, 20), data=st.data())
def test_each_token_is_scored_once_after_as_many_as_are_promised(size, length, data):
    stride = data.draw(st.integers(1, length))
    scored = []
    for window in windows(np.arange(size + 1), length, stride):
        assert len(window.tokens) <= length + 1
        for token in window.tokens[-window.scored :]:
            before = token - window.tokens[0]
            assert before >= min(token, length - stride + 1 if len(scored) >= length else 1)
            scored.append(token)
    assert scored == list(range(1, size + 1))


def test_figures_are_those_of_one_token_after_another(checkpoint):
    text = Tokenizer.load(checkpoint / "tokenizer.json")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.set_mesh(mesh_of(1, 1)):
        scorer = Scorer.load(checkpoint, 2, ops.float32())
        reader = Reader(text.encode, text.bos, LENGTH, STRIDE, refuse, Skipped())
        got = measure(scorer, reader, TEXTS).record()
        follow = jax.jit(execute.next_token_logits, static_argnames=("c", "ops"))
        nats = tokens = 0
        for one in TEXTS:
            x = [text.bos, *text.encode(one)]
            for n in range(1, len(x)):
                # The window of token n ends at the first of L, L + s, L + 2 s, ... that is not before it.
                end = next(e for e in range(LENGTH, 10**6, STRIDE) if e >= n) if n > LENGTH else LENGTH
                context = x[max(0, min(end, len(x) - 1) - LENGTH) : n]
                padded = np.zeros((1, LENGTH), np.int32)
                padded[0, : len(context)] = context
                logits = follow(
                    scorer.model,
                    scorer.bias,
                    padded,
                    np.array([len(context) - 1]),
                    c=scorer.c,
                    ops=scorer.ops,
                )
                row = np.asarray(logits, np.float64)[0]
                nats -= row[x[n]] - row.max() - math.log(np.exp(row - row.max()).sum())
                tokens += 1
    jax.config.update("jax_disable_most_optimizations", False)
    size = sum(len(one.encode()) for one in TEXTS)
    assert (got["documents"], got["tokens"], got["bytes"]) == (3, tokens, size)
    assert got["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_what_cannot_be_read_is_refused_or_counted_and_left_out():
    class Documents(list):
        def __getitem__(self, n):
            if n == 1:
                raise BadDocument("empty", "file:2", "the text is empty")
            return super().__getitem__(n)

    skipped = Skipped()
    reader = Reader(lambda text: np.array([1, 2]), 0, 4, 4, skip, skipped)
    assert len(list(reader.windows(Documents(["a", "b", "c"])))) == 2
    assert reader.figures == Figures(documents=2, bytes=2, tokens=4) and skipped.counts() == {"empty": 1}
    with pytest.raises(BadDocument):
        list(Reader(lambda text: np.array([1, 2]), 0, 4, 4, refuse, skipped).windows(Documents("abc")))
    with pytest.raises(ValueError, match="stride=5 must be from 1 to length=4"):
        Reader(lambda text: np.array([1]), 0, 4, 5, refuse, skipped)
    assert Figures().record() == {"documents": 0, "bytes": 0, "tokens": 0}


def test_the_command_measures_each_corpus(checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text(WORDS)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))

    def command(*arguments):
        line = [sys.executable, "-m", "experiments.perplexity", f"--checkpoint={checkpoint}", *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        return subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment)

    both = f"--corpus={tmp_path / 'a.txt'}", f"--corpus={tmp_path / '*.jsonl'}", "--text_key=body"
    done = command(*both, "--length=16", "--mesh_expert=2", f"--output={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = json.loads((tmp_path / "out.json").read_text()).values()
    assert a["documents"] == 1 and a["bytes"] == len(WORDS) and b["documents"] == 3
    assert done.stdout.count("bits_per_byte=") == 2
    wrong = command(f"--corpus={tmp_path / 'b.jsonl'}")
    assert wrong.returncode == 1 and "has no key 'text'" in wrong.stderr and "--on_bad=skip" in wrong.stderr
