"""The command that trains a tokenizer."""

import subprocess
import sys

from dsv3_jax.data.tokenizer import Tokenizer


def command(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.train_tokenizer", *flags], capture_output=True, text=True, check=False
    )


def test_the_command_trains_and_does_not_overwrite_unasked(tmp_path):
    (tmp_path / "text.txt").write_text("some words and some more words\n" * 20)
    output = tmp_path / "made" / "tokenizer.json"
    flags = (
        f"--output={output}",
        f"--source={tmp_path}/*.txt",
        "--vocab_size=270",
        "--validation_fraction=0",
    )
    made = command(*flags)
    assert made.returncode == 0, made.stderr
    tokenizer = Tokenizer.load(output)
    assert tokenizer.digest in made.stdout
    assert tokenizer.vocab_size == 270
    again = command(*flags)
    assert again.returncode != 0
    assert "is there already" in again.stdout + again.stderr
    assert command(*flags, "--overwrite").returncode == 0


def test_a_source_that_is_absent_is_named(tmp_path):
    failed = command(f"--output={tmp_path}/t.json", f"--source={tmp_path}/absent.jsonl")
    assert failed.returncode != 0
    assert "absent.jsonl: there is no such file" in failed.stdout + failed.stderr
    assert not list(tmp_path.iterdir())
