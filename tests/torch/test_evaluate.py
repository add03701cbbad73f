"""The shipped tasks have the same numbers through the harness's own Hugging Face back-end."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax import ops
from dsv3_jax.data import tokenizer
from experiments.evaluation import library
from tests.conftest import mesh_of
from tests.interop import released
from tests.torch import reference
from tools import convert

C = replace(released.TINY, vocab=600, max_length=128)
TASKS = ["stdlib"]
LIMIT = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights and a tokenizer without settings, as a run has it; and what to-hf makes of them."""
    directory = tmp_path_factory.mktemp("evaluate")
    released.write(directory / "source", released.tensors(C, released.F32), released.config(C))
    convert.from_hf(directory / "source", directory / "ours", jnp.dtype(jnp.float32))
    tokenizer.train(library.held_out(), 600, directory / "ours" / "tokenizer.json")
    convert.to_hf(directory / "ours", directory / "back", convert.FORMS["float32", "float32"], 10**8)
    return directory


def evaluated(lm):
    from experiments.evaluation.run import evaluate

    return evaluate(lm, TASKS, limit=LIMIT, bootstrap_iters=0)


@pytest.fixture(scope="module")
def ours(folders):
    from experiments.evaluation.adapter import Harness, Source

    jax.config.update("jax_disable_most_optimizations", True)
    with jax.set_mesh(mesh_of(1, 2)):
        found = evaluated(Harness(Source(folders / "ours", ops.float32(), 8)))
    jax.config.update("jax_disable_most_optimizations", False)
    return found


@pytest.fixture(scope="module")
def theirs(folders):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        model, _ = reference.load(folders / "back")
        return evaluated(HFLM(pretrained=model, tokenizer=str(folders / "back"), device="cpu", batch_size=4))


def answers(found):
    """What was said to each question, by task."""
    return {
        name: [answer for sample in samples for answer in sample["filtered_resps"]]
        for name, samples in found["samples"].items()
    }


def test_every_answer_is_that_of_the_hugging_face_back_end(ours, theirs):
    mine, his = answers(ours), answers(theirs)
    assert set(mine) == set(his) and len(mine) == 5
    for name, said in mine.items():
        assert len(said) == len(his[name]) >= LIMIT
        for a, b in zip(said, his[name], strict=True):
            if isinstance(a, str):
                assert a == b
            elif isinstance(a, tuple):
                assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
            else:  # of whole texts, thousands of nats
                assert a == pytest.approx(b, rel=1e-6)
    assert any(said for said in mine["stdlib_fill_in_middle"])


def test_so_is_every_metric(ours, theirs):
    for name, metrics in ours["results"].items():
        for key, value in metrics.items():
            if "acc" in key or "match" in key:
                assert value == theirs["results"][name][key]
            elif "_perplexity," in key or "bits_per_byte," in key:
                assert value == pytest.approx(theirs["results"][name][key], rel=1e-4)
