"""The benchmark of the training step: who takes turns, what is said of it, and where time goes."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.records import Refused
from experiments.run import Run
from tests.experiments.test_pretrain import CONFIG
from tools import time_by_kind
from tools.bench_train import Result, Turn, in_turns, lines, programs, report

H200 = "NVIDIA H200"
RIVALS = ["transformers"] if importlib.util.find_spec("transformers") else []


def test_programs_take_turns_until_one_cannot_go_on():
    calls = []

    def turn(name, left):
        calls.append((name, left))
        return "no memory" if name == "b" and left == 1 else Turn("cpu", [0.5, 0.25 * (left + 1)], None, {})

    results = in_turns(["a", "b", "c"], 3, turn)
    assert calls == [("a", 2), ("b", 2), ("c", 2), ("a", 1), ("b", 1), ("c", 1), ("a", 0), ("c", 0)]
    assert results["a"].seconds == [0.5, 0.75, 0.5, 0.5, 0.5, 0.25]
    assert results["b"] == Result([], "no memory")


def test_every_precision_is_timed_with_and_without_mtp_and_rivals_multiply_in_the_first():
    made = programs(Run(), ["bfloat16", "fp8"], ["transformers"])
    assert list(made) == [
        *("ours, bfloat16", "ours, bfloat16, no MTP", "ours, fp8", "ours, fp8, no MTP", "transformers")
    ]
    assert [made[name].args[0].precision for name in made] == [*["bfloat16"] * 2, *["fp8"] * 2, "bfloat16"]
    assert [made[name].args[0].model.mtp_depth for name in made] == [1, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("precisions", "rivals", "message"),
    [
        (["fp9"], [], r"--precisions=fp9 is none of float32, bfloat16, fp8 \(did you mean fp8\?\)"),
        (["fp8"], ["torch"], "--rivals=torch is none of transformers"),
        ([], [], "--precisions= leaves nothing"),
    ],
)
def test_unknown_programs_are_refused(precisions, rivals, message):
    with pytest.raises(Refused, match=message):
        programs(Run(), precisions, rivals)


def test_medians_are_compared_and_mfu_is_of_the_data_sheet():
    run = dataclasses.replace(Run(), train=dataclasses.replace(Run().train, batch_size=4))
    turn = Turn(H200, [9.0, 2.0, 2.0], 70 * 10**9, {"matmul": 1.5, "rest": 0.5})
    results = {
        "ours, bfloat16": Result([turn]),
        "transformers": Result([turn._replace(seconds=[3.0], kinds={})]),
        "transformers_compiled": Result([], "not run (exit 1): out of memory"),
    }
    found = report("deepseek_v3", run, results)
    ours = found["programs"]["ours, bfloat16"]
    assert ours["tokens_per_second"] == 4 * 4096 / 2
    assert ours["mfu"] == pytest.approx(4 * 4096 / 2 * found["flops_a_token"] / 989.5e12, rel=1e-3)
    text = "\n".join(lines(found))
    assert "1.50 times the faster rival" in text
    assert "out of memory" in text
    assert "at most 70.0 GB" in text
    assert "75.0%" in text.partition("by kind of work")[2]


TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/a/dsv3_jax/training/optim.py"
2 "/a/dsv3_jax/model/mla.py"
3 "/a/pallas_kernels/mla_attention/cpu.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=0 end_column=1}
2 {file_name_id=2 function_name_id=1 line=1 end_line=1 column=0 end_column=1}
3 {file_name_id=3 function_name_id=1 line=1 end_line=1 column=0 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}
3 {file_location_id=3 parent_frame_id=3}

%body (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %dot.1 = f32[8] dot(%p, %p), metadata={op_name="x" stack_frame_id=2}
  %inner = f32[8] add(%dot.1, %p), metadata={op_name="x" stack_frame_id=3}
  ROOT %swap = f32[8] all-to-all(%inner), replica_groups={{0,1}}
}

%more (q: f32[8]) -> pred[] {
  %q = f32[8] parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %loop = f32[8] while(%x), condition=%more, body=%body
  ROOT %adam = f32[8] multiply(%loop, %x), metadata={op_name="x" stack_frame_id=1}
}
"""


def span(name, start, duration, line=1):
    return {
        "ph": "X",
        "pid": 1,
        "tid": line,
        "ts": start,
        "dur": duration,
        "name": "n",
        "args": {"hlo_op": name},
    }


def test_time_is_told_by_kind_and_what_runs_inside_a_loop_is_not_counted_twice():
    loop = [span("loop", 0, 100), span("dot.1", 10, 30), span("inner", 40, 20), span("swap", 60, 5)]
    events = [*loop, span("adam", 100, 40), span("dot.1", 0, 7, line=2), {"ph": "X", "name": "no operation"}]
    spent = time_by_kind.by_kind(events, TEXT)
    want = {"matmul": 37, "attention": 20, "all-to-all": 5, "optimizer": 40, "rest": 45}
    assert spent == pytest.approx({kind: 1e-6 * want.get(kind, 0) for kind in time_by_kind.KINDS})
    assert list(spent) == list(time_by_kind.KINDS)


def test_a_trace_of_another_program_is_refused():
    with pytest.raises(ValueError, match="None of the 1 instructions in the trace is one of the program's"):
        time_by_kind.by_kind([span("other", 0, 1)], TEXT)


def test_a_profile_of_this_machine_is_read(tmp_path):
    x = jnp.ones((1024, 1024))
    program = jax.jit(lambda x: jnp.sin(x @ x @ x)).lower(x).compile()
    with jax.profiler.trace(tmp_path):
        program(x).block_until_ready()
    spent = time_by_kind.read(tmp_path, program.as_text())
    assert spent["matmul"] > 0.5 * sum(spent.values()) > 0


def test_a_folder_without_a_trace_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \*\.trace\.json\.gz"):
        time_by_kind.read(tmp_path, TEXT)


@pytest.mark.slow
def test_the_command_times_profiles_and_compares(tmp_path):
    (tmp_path / "small.py").write_text(CONFIG)
    arguments = [f"--config={tmp_path}/small.py", "--precisions=float32", "--rounds=1", "--timed_steps=1"]
    files = [f"--results={tmp_path}/found.json", f"--profile={tmp_path}/profile"]
    rivals = f"--rivals={','.join(RIVALS)}"
    command = [sys.executable, "-m", "tools.bench_train", *arguments, *files, rivals]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["programs"]
    assert list(found) == ["ours, float32", "ours, float32, no MTP", *RIVALS]
    for name, figures in found.items():
        assert len(figures["seconds"]) == len(figures["seconds"][0]) == 1, figures
        assert bool(figures["kinds"]) == name.startswith("ours")
        assert f"{name:26s} {figures['median']:8.4f} s a step" in done.stdout
