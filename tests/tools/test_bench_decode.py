"""`python -m tools.bench_decode` times all programs, whose greedy text is the same."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp

from dsv3_jax.data import tokenizer
from tests.interop import released
from tools import convert

C = replace(released.TINY, vocab=300, mtp_depth=1)


def test_all_programs_are_timed_and_give_one_text(tmp_path):
    released.write(tmp_path / "source", released.tensors(C, released.F32), released.config(C))
    convert.from_hf(tmp_path / "source", tmp_path / "ours", jnp.dtype(jnp.float32))
    tokenizer.train(["def main(): return 0\n"] * 3, 290, tmp_path / "ours" / "tokenizer.json")
    command = [
        sys.executable, "-m", "tools.bench_decode", f"--checkpoint={tmp_path}/ours", "--batches=1,3",
        "--prompt_tokens=8", "--new_tokens=12", "--turns=1", f"--results={tmp_path}/figures.json",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "figures.json").read_text())
    rivals = ["transformers"] if importlib.util.find_spec("transformers") else []
    for batch in ("1", "3"):
        rows = found["batches"][batch]
        assert list(rows) == ["ours", "ours, drafts", *rivals]
        assert all(row["tokens_per_second"] > 0 and not row["tokens_that_differ"] for row in rows.values())
        drafts = rows["ours, drafts"]
        assert drafts["tokens_per_step"] == 1 + drafts["acceptance"]
    assert done.stdout.count("tokens differ") == 2 * (1 + len(rivals))
