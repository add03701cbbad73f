"""The plan of a big run: what is compiled, what is read of it, and how it is shown."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsv3_jax.pipeline.placement import placement
from dsv3_jax.pipeline.table import table
from experiments import run as runs
from experiments import settings
from tools.planning import aot, page
from tools.planning.program import Loop

MESH = (
    "--config.mesh.pipeline=2",
    "--config.mesh.expert=4",
    "--config.pipeline.microbatches=4",
    "--config.train.batch_size=16",
    "--config.model.mtp_depth=0",
    "--config.data.shards=1",
)
needs_compiler = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="no libtpu: a TPU compiler"
)


def plan(*arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tools.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@needs_compiler
def test_a_step_is_compiled_for_absent_chips_and_read(tmp_path):
    done = plan(
        "--config=tiny", "--topology=v5p:2x2x2", *MESH,
        f"--json={tmp_path}/plan.json", f"--html={tmp_path}/a.html",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["device"]["count"] == 8
    memory = figures["memory"]
    assert memory["fits"] and memory["host_bytes"] == 0
    assert memory["peak_bytes"] >= memory["arguments_bytes"] + memory["temporaries_bytes"] > 0
    kinds = memory["by_kind"]
    assert all(size >= 0 for size in kinds.values())
    np.testing.assert_allclose(sum(kinds.values()), memory["peak_bytes"], rtol=0.01)
    exchange = figures["collectives"]["expert_all_to_all"]
    assert 0 < exchange["asynchronous"] <= exchange["count"] and 0 <= exchange["hidden_share"] <= 1
    assert figures["flops"] > 0 and figures["compile_seconds"] > 0
    assert 0 < figures["mfu_bound"] < 1
    tokens = figures["tokens_per_second_bound"] * figures["step_seconds_bound"]
    config: Any = settings.load("tiny")
    np.testing.assert_allclose(tokens, 16 * config.train.sequence_length)
    assert "expert all to all" in done.stdout
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


@needs_compiler
def test_a_mesh_of_another_size_is_refused_in_a_sentence():
    done = plan("--config=tiny", "--topology=v5p:2x2x1", *MESH)
    assert done.returncode == 1
    assert "needs 8 devices" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("machine", "words"), [("v5q:2x2x1", "no machine"), ("h200:8", "add --analytic")])
def test_a_machine_that_cannot_be_planned_for_is_refused_in_a_sentence(machine, words):
    done = plan("--config=tiny", f"--topology={machine}")
    assert done.returncode == 1
    assert machine in done.stderr and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="a TPU compiler is installed")
def test_without_a_compiler_the_way_to_one_is_named():
    done = plan("--config=tiny", "--topology=v5p:2x2x1")
    assert done.returncode == 1
    assert "pip install '.[tpu]'" in done.stderr and "Traceback" not in done.stderr


REPORT = (
    "--analytic", "--config=deepseek_v3", "--topology=h800:2048", "--kernels=measured",
    "--config.mesh.pipeline=16", "--config.mesh.data=2", "--config.mesh.expert=64",
    "--config.pipeline.microbatches=120", "--config.precision=fp8",
)  # fmt: skip


def test_the_report_s_own_run_needs_no_compiler(tmp_path):
    done = plan(*REPORT, f"--json={tmp_path}/plan.json", f"--html={tmp_path}/plan.html")
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert abs(figures["days_for_1T_tokens"] / 3.7 - 1) < 0.1
    np.testing.assert_allclose(sum(figures["terms"].values()), figures["step_seconds_bound"])
    order = [row["schedule"] for row in figures["schedules"]]
    assert order[0] == "dualpipe" and set(order) == {"gpipe", "1f1b", "zb1p", "dualpipe", "dualpipev"}


def test_schedules_are_compared_for_a_run_that_recomputes_its_experts(tmp_path):
    done = plan(
        "--analytic", "--config=deepseek_v3", "--topology=v5p:8x8x16", "--config.mesh.pipeline=16",
        "--config.mesh.expert=64", "--config.pipeline.microbatches=240", "--config.pipeline.waiting=0",
        "--config.recompute=experts", "--config.dispatch.room=1.25", f"--json={tmp_path}/plan.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["schedules"][0]["schedule"] == "dualpipe" and figures["memory"]["fits"]


def test_a_recomputation_that_only_the_compiler_knows_is_refused():
    done = plan(*REPORT, "--config.recompute=everything")
    assert done.returncode == 1
    assert "leave out --analytic" in done.stderr and "Traceback" not in done.stderr


def test_measured_times_are_refused_for_what_was_not_measured():
    done = plan(*REPORT, "--config.precision=bfloat16")
    assert done.returncode == 1
    assert "not of bfloat16 on h800" in done.stderr and "Traceback" not in done.stderr


def turns_of(schedule):
    """Turns of loops in a step of DeepSeek-V3 over 16 ranks, by scope, and the layers of each rank."""
    config: Any = settings.load("deepseek_v3")
    config.mesh.pipeline, config.mesh.expert = 16, 64
    config.pipeline.schedule, config.pipeline.microbatches = schedule, 240
    run = runs.resolve(config)
    made = run.setup.schedule(16, 240)
    slots, turns = len(table(made)[0].forward.stage), aot.turns(run)
    scopes = ("pair", "forward", "backward", "pair/while/body/further_rounds")
    counts = {s: slots * turns(Loop("while.1", f"jit(step)/while/body/{s}/while", "")) for s in scopes}
    return counts, placement(made, run.model).counts.mean(axis=1)


def test_loops_turn_as_often_as_the_slowest_rank_of_each_slot_asks_for():
    counts, layers = turns_of("dualpipe")
    # A rank takes each of 240 micro-batches through a stage; in some slots it waits for another one.
    assert 240 * layers.max() <= counts["pair"] + counts["forward"] <= 1.3 * 240 * layers.max()
    assert counts["pair"] > 0.9 * 240 * layers.max()
    assert counts["pair/while/body/further_rounds"] == 0


def test_with_one_forward_one_backward_some_rank_always_runs_a_backward():
    counts, layers = turns_of("1f1b")
    assert counts["pair"] == 0 and counts["forward"] < counts["backward"]
    assert counts["backward"] > 1.5 * 240 * layers.max()


def test_links_of_a_torus_carry_what_goes_far_several_times():
    places = np.empty((2, 1, 16), object)
    for pipeline, expert in np.ndindex(2, 16):
        places[pipeline, 0, expert] = SimpleNamespace(coords=(expert // 4, expert % 4, pipeline))
    grid = SimpleNamespace(
        devices=places,
        axis_names=("pipeline", "data", "expert"),
        shape={"pipeline": 2, "data": 1, "expert": 16},
    )
    rates = aot.links(grid, 600e9, 3)  # pyright: ignore[reportArgumentType]
    # In a ring of four the others are 1, 2 and 1 hops away: of four links a way each carries half.
    assert rates["expert"] == 200e9
    assert rates["pipeline"] == 200e9  # half goes over one link, which is a sixth of all


def figures():
    return {
        "config": "a<b",
        "topology": "v5p:2x2x1",
        "device": {"kind": "v5p", "count": 4, "memory_bytes": 10e9},
        "memory": {"peak_bytes": 12e9, "fits": False, "by_kind": {"parameters": 5e9, "activations": 7e9}},
        "collectives": {
            "expert_all_to_all": {
                "count": 4.0, "asynchronous": 3.0, "bytes": 2e9, "seconds": 0.5, "hidden_share": 0.75
            }
        },
        "step_seconds_bound": 2.0,
        "tokens_per_second_bound": 1000.0,
        "mfu_bound": 0.25,
        "device_hours_for_14.8T_tokens": 5e6,
        "exposed": [{"seconds": 0.1, "op_name": "x/<y>"}],
    }  # fmt: skip


def test_the_page_shows_what_does_not_fit_and_trusts_no_name():
    text = page.html(figures())
    assert "a&lt;b" in text and "&lt;y&gt;" in text and "<script" not in text
    assert "does not fit" in text and 'class="bar over"' in text and "75.0% hidden" in text


def test_words_say_the_same():
    text = page.words(figures())
    assert "12.0 GB of 10.0 GB a device (DOES NOT FIT)" in text
    assert "3 of 4 asynchronous" in text and "75.0% beside compute" in text
