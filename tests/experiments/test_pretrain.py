"""Whole runs in processes of their own: they learn, survive being killed, and refuse what would go wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import ROOT

STEPS = 24
CONFIG = f"""
from experiments.configs import tiny

def get_config():
    config = tiny.get_config()
    config.model.update(vocab=512, d_model=32, layers=2, heads=2, d_nope=8, d_rope=4, d_value=8, q_rank=16)
    config.model.update(kv_rank=8, d_dense=48, d_expert=16, experts=8, top_k=2, groups=4, top_groups=2)
    config.recipe.update(learning_rate=4e-3, warmup_steps=4)
    config.train.update(steps={STEPS}, batch_size=8, sequence_length=32, log_every=1)
    config.train.update(evaluate_every=8, evaluation_sequences=24)
    config.checkpoint.update(every=4, keep=3)
    return config
"""


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Starts runs of one small config; compiled programs and the tokenizer are shared."""
    return Runner(tmp_path_factory.mktemp("runs"))


class Runner:
    def __init__(self, folder: Path):
        self.folder, self.config = folder, folder / "test.py"
        self.config.write_text(CONFIG)

    def start(
        self,
        workdir: str,
        *arguments: str,
        devices: int = 1,
        more: Mapping[str, str] | None = None,
        program: tuple[str, str] = ("-m", "experiments.pretrain"),
    ) -> subprocess.Popen:
        environment = (
            os.environ
            | (more or {})
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling takes most of the time
            }
        )
        command = [sys.executable, *program, f"--config={self.config}"]
        return subprocess.Popen(
            [*command, f"--workdir={self.folder / workdir}", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen, seconds: float = 300) -> str:
        """The output of a run, which must end by itself."""
        try:
            return process.communicate(timeout=seconds)[0]
        finally:
            self.kill(process)

    def run(self, workdir: str, *arguments: str, devices: int = 1, code: int = 0) -> str:
        process = self.start(workdir, *arguments, devices=devices)
        output = self.finish(process)
        assert process.returncode == code, output
        return output

    def kill(self, process: subprocess.Popen) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()

    def until(self, process: subprocess.Popen, text: str) -> None:
        """Reads output up to a line with this text."""
        assert process.stdout is not None
        for line in process.stdout:
            if text in line:
                return
        raise AssertionError(f"the run ended before it said {text!r}")

    def lines(self, workdir: str) -> list[dict]:
        """What the run logged, without what depends on the clock."""
        text = (self.folder / workdir / "metrics.jsonl").read_text()
        return [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in text.splitlines()
        ]


@pytest.fixture(scope="module")
def whole(runner):
    """The output of a run that nothing disturbed."""
    return runner.run("whole")


@pytest.mark.slow
def test_a_run_learns_and_leaves_what_it_promises(runner, whole):
    folder = runner.folder / "whole"
    lines = runner.lines("whole")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    keys = {"tokens", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "learning_rate", "max_vio"}
    assert keys <= training[0].keys()
    assert training[-1]["main_loss"] < training[0]["main_loss"] - 0.5
    assert [line["step"] for line in lines if "val_loss" in line] == [8, 16, 24]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["model"]["d_model"] == 32
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [16, 20, 24]
    for words in ("validation loss", "bigram of same tokens", "unigram entropy", "continued by the model"):
        assert words in whole


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step 6/", "step 8/", "step 13/"])
def test_a_killed_run_goes_on_bit_for_bit(runner, whole, moment):
    workdir = f"killed-{moment.split()[1].rstrip('/')}"
    process = runner.start(workdir)
    runner.until(process, moment)
    runner.kill(process)
    runner.run(workdir)
    assert runner.lines(workdir) == runner.lines("whole")


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(runner, whole):
    process = runner.start("stopped")
    runner.until(process, "step 6/")
    os.kill(process.pid, signal.SIGTERM)
    output = runner.finish(process)
    assert process.returncode == 0, output
    assert "Stopped as asked" in output
    saved = max(int(p.name) for p in (runner.folder / "stopped/checkpoints").iterdir())
    assert saved == runner.lines("stopped")[-1]["step"]
    runner.run("stopped")
    assert runner.lines("stopped") == runner.lines("whole")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_another_mesh_goes_on(runner, whole):
    runner.run("damaged", "--config.train.steps=12")
    arrays = [p for p in (runner.folder / "damaged/checkpoints/12/model").rglob("c/**/*") if p.is_file()]
    largest = max(arrays, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    output = runner.run("damaged", "--config.mesh.data=2", "--config.mesh.expert=2", devices=4)
    assert "12" in output and "8" in output
    for got, want in zip(runner.lines("damaged"), runner.lines("whole"), strict=True):
        if "loss" in want:
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)  # FP32 sums in another order


@pytest.mark.slow
def test_another_model_in_the_same_folder_is_refused_by_key(runner, whole):
    output = runner.run("whole", "--config.model.d_expert=32", "--config.model.route_scale=1.5", code=1)
    assert "d_expert" in output and "route_scale" in output and "Traceback" not in output


@pytest.mark.slow
def test_a_run_that_diverges_ends_and_names_the_last_good_step(runner):
    output = runner.run(
        "diverged", "--config.recipe.learning_rate=1e30", "--config.train.max_skipped=3", code=1
    )
    assert "3 steps in a row (limit 3)" in output and "the last good step is" in output
    assert runner.lines("diverged")[-1]["skipped_in_a_row"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument,words",
    [
        ("--config.mesh.data=3", "config.mesh.data=3"),
        ("--config.mesh.pipeline=2", "config.mesh.pipeline=2"),
        ("--config.pipeline.schedule=dualpip", "did you mean dualpipe"),
        ("--config.train.batch_size=7", "config.data.shards"),
        ("--config.model.d_modle=64", "did you mean model.d_model"),
        ("--config.train.steps=many", "steps"),
        ("--config.recipe.learning_rate=nan", "finite"),
        ("--config.precision=float16", "precision"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(runner, argument, words):
    output = runner.run("refused", "--config.data.shards=2", argument, code=1)
    assert words in output and "Traceback" not in output


@pytest.fixture(scope="module")
def longer(runner, whole):
    """A config that goes on from a copy of the whole run, with YaRN and four times its length."""
    shutil.copytree(runner.folder / "whole", runner.folder / "origin")
    path = runner.folder / "longer.py"
    path.write_text(
        CONFIG.replace("def get_config", "def original")
        + f"""
from dsv3_jax.config import Yarn
from experiments.configs.deepseek_v3_32k import extended

def get_config():
    config = extended(original(), Yarn(factor=4.0, original_length=32))
    config.train.update(steps=6, batch_size=2, sequence_length=128)
    config.start_from = {str(runner.folder / "origin")!r}
    return config
"""
    )
    return f"--config={path}"


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another_and_goes_on_without_it(runner, whole, longer):
    assert f"Starts from the weights of step {STEPS}" in runner.run("longer", longer)
    first = runner.lines("longer")[0]
    assert first["main_loss"] < runner.lines("whole")[0]["main_loss"] - 0.5
    assert json.loads((runner.folder / "longer/config.json").read_text())["start_from"].endswith("origin")
    runner.run("stopped and gone on", longer, "--config.train.steps=4")
    shutil.rmtree(runner.folder / "origin")
    assert "Starts from" not in runner.run("stopped and gone on", longer)
    losses = [
        [line["loss"] for line in runner.lines(workdir) if "loss" in line]
        for workdir in ("longer", "stopped and gone on")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("directory", "words"), [("whole", "config.model.d_expert is 32"), ("nowhere", "holds no checkpoint")]
)
def test_weights_that_are_not_there_or_of_another_model_are_refused(runner, whole, directory, words):
    arguments = f"--config.start_from={runner.folder / directory}", "--config.model.d_expert=32"
    output = runner.run("from none", *arguments, code=1)
    assert words in output and "Traceback" not in output


@pytest.mark.slow
def test_a_step_over_its_time_is_ended_with_its_stack(runner):
    process = runner.start("hung", "--config.train.hang_seconds=0.001")
    output = runner.finish(process)
    # Which threads the stacks name, and whether walking a stack that moves survives, is not certain here; for
    # a main thread that really hangs it is, and is tested with the watchdog itself.
    assert process.returncode != 0
    assert "Timeout (0:00:00.001000)!" in output and "most recent call first" in output
