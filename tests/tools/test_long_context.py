"""The command trains three phases from each other, shows four models, and trains nothing twice."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FIRST = """
from experiments.configs import toy_128

def get_config():
    config = toy_128.get_config()
    config.model.update(vocab=300, d_model=16, heads=2, d_dense=16, d_expert=16, q_rank=8, kv_rank=8)
    config.model.max_length = 32
    config.data.shards = 1
    config.train.update(steps=2, batch_size=4, sequence_length=32, evaluation_sequences=4)
    return config
"""
FURTHER = """
from dsv3_jax.config import Yarn
from experiments.configs.deepseek_v3_32k import extended
from experiments import settings

def get_config():
    config = extended(settings.load({first!r}), Yarn(original_length=32))
    config.train.update(batch_size={batch_size}, sequence_length={sequence_length})
    return config
"""


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    first = folder / "first.py"
    first.write_text(FIRST)
    for name, batch_size, sequence_length in (("second", 2, 64), ("third", 1, 128)):
        text = FURTHER.format(first=str(first), batch_size=batch_size, sequence_length=sequence_length)
        (folder / f"{name}.py").write_text(text)
    return folder


def run(folder, *arguments, code=0):
    names = ",".join(str(folder / f"{name}.py") for name in ("first", "second", "third"))
    command = [
        sys.executable,
        "-m",
        "tools.long_context",
        f"--phases={names}",
        f"--workdir={folder / 'runs'}",
    ]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes most of the time
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    done = subprocess.run(
        [*command, "--rows=2", "--needles=1", *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.slow
def test_three_phases_are_trained_once_measured_and_drawn(phases):
    output = run(phases)
    assert output.count("Starts from the weights of step 2") == 2
    report = json.loads((phases / "runs/report.json").read_text())
    assert list(report["losses"]) == ["first", "first with YaRN", "second", "third"]
    assert report["edges"] == [0, 32, 64, 128] and report["lengths"] == [32, 64, 128]
    assert all(len(losses) == 3 for losses in report["losses"].values())
    assert len(report["recall"]["third"]) == 3 and len(report["recall"]["third"][0]) == 5
    assert (phases / "runs/report.png").read_bytes().startswith(b"\x89PNG")
    again = run(phases, f"--json={phases / 'again.json'}", f"--png={phases / 'again.png'}")
    assert "step" not in again
    assert json.loads((phases / "again.json").read_text())["losses"] == report["losses"]
    first = phases / "first.py"
    first.write_text(FIRST.replace("steps=2", "steps=3"))
    assert "holds a run of other settings" in run(phases, code=1)
