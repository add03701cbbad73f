"""`python -m experiments.generate`: text from a checkpoint, one at a time and many at once."""

import json
import os
import subprocess
import sys

import pytest

from dsv3_jax.data import tokenizer
from tests.experiments.conftest import WORDS


def generate(checkpoint, *arguments):
    command = [sys.executable, "-m", "experiments.generate", f"--checkpoint={checkpoint}", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_a_prompt_is_continued_and_many_give_what_each_gives_alone(checkpoint, tmp_path):
    lines = [{"prompt": WORDS}, {"tokens": [5, 6, 7]}, {"prompt": "fox"}, {"prompt": WORDS * 2}]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    many = generate(
        checkpoint, f"--input={source}", f"--output={out}", "--max_tokens=12", "--slots=2", "--speculative"
    )
    assert many.returncode == 0, many.stderr[-3000:]
    assert "of drafts right" in many.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(results) == 4
    for result in results:
        assert len(result["tokens"]) == len(result["logprobs"]) <= 12
        assert result["finish_reason"] == ("length" if len(result["tokens"]) == 12 else "stop")
        assert all(logprob <= 0 for logprob in result["logprobs"])
    alone = generate(checkpoint, "--prompt=fox", "--max_tokens=12", "--mesh_expert=2")
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert alone.stdout == results[2]["text"] + "\n"


def test_a_chat_prompt_goes_through_the_template(checkpoint, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = tokenizer.Tokenizer.load(checkpoint / "tokenizer.json")
    same = [text.bos, *text.encode("hello").tolist()]
    for flag, line in (("--chat", {"prompt": "hello"}), ("--nochat", {"tokens": same})):
        source.write_text(json.dumps(line) + "\n")
        done = generate(checkpoint, f"--input={source}", f"--output={out}", "--max_tokens=5", flag)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(out.read_text())
        if flag == "--chat":
            want = result
    assert result == want


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt=a", "--max_tokens=500"], "more than the 128 of a slot"),
        (["--prompt=a", "--input=b", "--output=c"], "Give --prompt=TEXT"),
        (["--prompt="], "must be above 0"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(checkpoint, arguments, said):
    done = generate(checkpoint, *arguments)
    assert done.returncode != 0 and said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
