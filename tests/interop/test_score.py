"""Scoring: one output line for each input line, in order, whatever batch a line was scored in."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import mesh, ops
from dsv3_jax.data.tokenizer import train
from experiments import score, scoring
from tests.interop import released
from tests.interop.released import DIRECT
from tools import convert

REPOSITORY = Path(__file__).parents[2]
OPERATIONS = ops.float32()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("score")
    weights = released.tensors(DIRECT, released.F32)
    released.write(directory / "source", weights, released.config(DIRECT))
    convert.from_hf(directory / "source", directory / "ours", jnp.dtype(jnp.float32))
    return directory / "ours"


@pytest.fixture
def run(checkpoint, tmp_path):
    def run(lines, sizes=(1, 4, 2), batch_size=8, tokenizer_file=None):
        source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        text = (line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        source.write_text("".join(text))
        with jax.set_mesh(mesh.make_mesh(*sizes)):
            score.score_file(
                checkpoint,
                source,
                out,
                tokenizer_file=tokenizer_file,
                batch_size=batch_size,
                operations=OPERATIONS,
            )
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def lines(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [{"tokens": rng.integers(0, DIRECT.vocab, n).tolist()} for n in lengths]


def test_lines_keep_their_order_and_do_not_see_each_other_or_padding(run):
    mixed = lines([5, 1, 30, 17, 2, 9, 18, 5, 16, 12, 3])
    together = run(mixed)
    assert [len(r["logprobs"]) for r in together] == [len(m["tokens"]) - 1 for m in mixed]
    again = run([{"tokens": m["tokens"]} for m in reversed(mixed)])[::-1]
    for a, b in zip(together, again, strict=True):
        # Another row of another batch: sums run in another order.
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], rtol=0, atol=1e-5)
        assert a["sum"] == pytest.approx(sum(a["logprobs"]))


def test_a_prefix_has_the_scores_of_the_whole(run):
    whole, prefix = lines([30])[0]["tokens"], lines([30])[0]["tokens"][:7]
    a, b = run([{"tokens": whole}, {"tokens": prefix}])
    np.testing.assert_allclose(a["logprobs"][:6], b["logprobs"], rtol=0, atol=1e-5)


def test_one_token_has_nothing_to_predict(run):
    assert run([{"tokens": [5]}]) == [{"logprobs": [], "sum": 0.0}]


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 1, 8)])
def test_every_mesh_scores_alike(run, sizes):
    some = lines([5, 16, 12, 3])
    for a, b in zip(run(some), run(some, sizes), strict=True):
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], rtol=0, atol=1e-5)


def test_batches_have_few_widths_and_every_line_that_predicts_something():
    lengths = np.random.default_rng(0).integers(1, 500, 200).tolist()
    plan = list(scoring.batches(lengths, 8))
    assert sorted(i for rows, _ in plan for i in rows) == [i for i, n in enumerate(lengths) if n > 1]
    assert {width for _, width in plan} <= {16, 32, 64, 128, 256, 512}
    for rows, width in plan:
        assert len(rows) <= 8
        for i in rows:
            assert lengths[i] - 1 <= width and (width == 16 or lengths[i] - 1 > width // 2)


def test_text_is_encoded_by_the_tokenizer_that_is_given(run, tmp_path):
    small = train(["hello world " * 20], 280, tmp_path / "tokenizer.json")
    # 64 ids are fewer than the tokenizer's: the file is refused rather than an id wrapped around.
    with pytest.raises(ValueError, match=r"tokenizer\.json: token .* has id"):
        run([{"text": "hello"}], tokenizer_file=small.path)


def test_text_without_a_tokenizer_says_how_to_give_one(run):
    with pytest.raises(FileNotFoundError, match="--tokenizer=FILE"):
        run([{"text": "hello"}])


BAD = {
    "no_json": ("{\n", "not JSON"),
    "empty_line": ("\n", "not JSON"),
    "a_list": ("[1]\n", "JSON list"),
    "neither_key": ({"ids": [1]}, "neither"),
    "text_is_no_text": ({"text": 5}, "neither"),
    "no_tokens": ({"tokens": []}, "no tokens"),
    "no_list": ({"tokens": "1 2"}, "no tokens"),
    "beyond_the_vocabulary": ({"tokens": [1, 64]}, "64, but ids are integers from 0 to 63"),
    "negative": ({"tokens": [-1]}, "-1"),
    "a_float": ({"tokens": [1.0]}, "1.0"),
    "a_boolean": ({"tokens": [True]}, "True"),
    "too_long": ({"tokens": [1] * 130}, "positions end at 128"),
}


@pytest.mark.parametrize(("line", "named"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_by_file_and_number_and_nothing_is_written(run, tmp_path, line, named):
    with pytest.raises(ValueError, match=rf"in\.jsonl:2 .*{named}"):
        run([{"tokens": [1, 2]}, line])
    assert not (tmp_path / "out.jsonl").exists()


def test_invalid_utf8_is_named_by_line(checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"tokens": [1]}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:2"):
        list(score.read(tmp_path / "in.jsonl", DIRECT, checkpoint, None))


def test_the_command_scores_and_says_what_is_wrong_in_one_sentence(checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    arguments = [f"--checkpoint={checkpoint}", f"--input={tmp_path / 'in.jsonl'}"]

    def command(*more):
        return subprocess.run(
            [sys.executable, "-m", "experiments.score", *arguments, *more],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=180,
        )

    done = command(f"--output={tmp_path / 'out.jsonl'}", "--precision=bfloat16")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["logprobs"]) == 2
    wrong = command(f"--output={tmp_path / 'other.jsonl'}", "--mesh_data=3")
    assert wrong.returncode == 1 and "config.mesh.data=3" in wrong.stderr, wrong
    assert "Traceback" not in wrong.stderr and not (tmp_path / "other.jsonl").exists()
