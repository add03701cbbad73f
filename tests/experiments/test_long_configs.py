"""The phases of the extension have the report's numbers (arXiv:2412.19437, 4.3), the toy their ratios."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax.config import Config, Yarn
from dsv3_jax.model import rope
from dsv3_jax.training import recipe
from experiments import settings
from experiments.run import resolve
from tests.conftest import ROOT

PHASES = {"deepseek_v3_32k": (1920, 32_768), "deepseek_v3_128k": (480, 131_072)}


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_has_the_reports_numbers(name):
    run = resolve(settings.load(name))
    assert (run.train.batch_size, run.train.sequence_length) == PHASES[name]
    assert run.train.steps == 1000
    assert run.model.yarn == Yarn(
        factor=40.0, original_length=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
    )
    assert run.model == Config(yarn=Yarn(), max_length=163_840)  # as in the released configuration
    tokens = run.train.batch_size * run.train.sequence_length
    for step in (0, 1, 999):
        seen = float(step * tokens)
        assert recipe.learning_rate(run.recipe, step, seen) == pytest.approx(7.3e-6)
        assert recipe.bias_speed(run.recipe, seen) == 0.0
        assert recipe.mtp_weight(run.recipe, seen) == pytest.approx(0.1)
        assert recipe.batch_size(run.recipe, run.train.batch_size, 1, int(seen)) == run.train.batch_size


def test_every_step_has_as_many_tokens_as_one_of_pretraining_and_twice_that_in_the_toy():
    def tokens(name):
        train = resolve(settings.load(name)).train
        return train.batch_size * train.sequence_length

    assert len({tokens(name) for name in ("deepseek_v3", *PHASES)}) == 1
    assert 2 * tokens("toy_128") == tokens("toy_1k") == tokens("toy_4k")


@pytest.mark.parametrize(("toy", "real"), [("toy_1k", "deepseek_v3_32k"), ("toy_4k", "deepseek_v3_128k")])
def test_the_toy_is_stretched_as_the_report_stretches(toy, real):
    short, small, large = (resolve(settings.load(name)) for name in ("toy_128", toy, real))
    assert short.train.sequence_length == short.model.max_length == small.model.yarn.original_length == 128
    assert small.train.sequence_length / 128 == large.train.sequence_length / 4096
    assert small.model.yarn == Yarn(original_length=128)
    assert recipe.learning_rate(small.recipe, 0, 0.0) == pytest.approx(short.recipe.final_learning_rate)


def test_yarn_of_the_toy_by_hand():
    plain, stretched = (
        rope.frequencies(resolve(settings.load(name)).model) for name in ("toy_128", "toy_4k")
    )
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001])
    # 128 positions are 20 turns of the first pair, which is kept, 2 of the second, which is half way, and
    # less than one of the others, which turn forty times as slowly.
    np.testing.assert_allclose(stretched, [1, 0.1 * (0.5 + 0.5 / 40), 0.01 / 40, 0.001 / 40])


@pytest.mark.parametrize("name", ["deepseek_v3_128k", "toy_4k"])
def test_a_phase_is_printed(name):
    command = [sys.executable, "-m", "experiments.pretrain", f"--config={name}", "--print_config"]
    text = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    config = json.loads(text)
    assert config["model"]["yarn"]["factor"] == 40.0
    assert config["start_from"] is None
