"""Runs of several processes: they train as one, whatever axis crosses between them, and end together."""

import json
import signal
import socket
import time

import pytest

from tests.experiments.test_pretrain import Runner

STEPS = 12
COMMON = (f"--config.train.steps={STEPS}", "--config.train.evaluate_every=0", "--config.data.shards=2")
STAGES = ("--config.mesh.pipeline=2", "--config.pipeline.microbatches=2")
DATA = "--config.mesh.data=2"
EXPERTS_ACROSS = "--config.mesh.expert=2", "--config.dispatch.hosts=2"
STAGES_ACROSS = ("-m", "experiments.pretrain")
# A mesh places the devices of a process along its last axes; here a process has one of each stage.
DATA_ACROSS = (
    "-c",
    """
import jax, numpy as np
from dsv3_jax import mesh
from experiments import pretrain, settings
pretrain.make_mesh = lambda run: mesh.make_mesh(2, 2, 1, np.array(jax.devices()).reshape(2, 2).T.ravel())
settings.run(pretrain.main)
""",
)
# Processes learn of a loss within 30 seconds, usually at once from a closed connection, and then wait 10.
BOUND = 45  # seconds


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("runs"))


def start(runner, workdir, processes, *arguments, devices=1, program=STAGES_ACROSS):
    """The processes of a run; without a cache, which serves the first alone, for whom Gloo waits 30 s."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launch = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}
    launch["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    return [
        runner.start(
            workdir,
            *(*COMMON, *arguments),
            devices=devices,
            more=launch | {"JAX_PROCESS_ID": str(i)},
            program=program,
        )
        for i in range(processes)
    ]


def finish(runner, processes):
    outputs = [runner.finish(process) for process in processes]
    assert not any(process.returncode for process in processes), outputs


def lose(runner, processes, victim, step):
    """Kills one of two processes in a step after a checkpoint, and sees how the other ends."""
    runner.until(processes[1 - victim], f"step {step}/")
    processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    output = runner.finish(processes[1 - victim], BOUND)
    assert processes[1 - victim].returncode not in (0, None), output
    assert time.monotonic() - begin < BOUND
    assert output.endswith(
        f"Process {1 - victim} of 2 ended before its run was complete: it was killed, met the error above, "
        "or lost another process; start all processes again with the same command, and they go on from the "
        "last checkpoint.\n"
    )
    assert f"Process {victim} of 2 ended before" in runner.finish(processes[victim])


def arrays(runner, workdir):
    """The shape, type and digest of every array in the last checkpoint."""
    path = runner.folder / workdir / "checkpoints" / str(STEPS) / "meta" / "metadata"
    return json.loads(path.read_text())["arrays"]


@pytest.mark.slow
def test_two_processes_that_lose_each_other_end_soon_and_go_on_bit_for_bit_as_one_that_lost_none(runner):
    runner.run("whole", *COMMON, DATA, devices=2)
    lose(runner, start(runner, "lost", 2, DATA), victim=1, step=6)
    lose(runner, start(runner, "lost", 2, DATA), victim=0, step=10)
    finish(runner, start(runner, "lost", 2, DATA))
    assert runner.lines("lost") == runner.lines("whole")
    assert arrays(runner, "lost") == arrays(runner, "whole")


@pytest.mark.slow
def test_processes_with_stages_experts_and_data_go_on_from_each_other_and_train_as_one(runner):
    """Four processes with a device each, two with data across, and one."""
    runner.run("one", *COMMON, *STAGES, DATA, devices=4)
    finish(runner, start(runner, "many", 4, *STAGES, *EXPERTS_ACROSS, "--config.train.steps=4"))
    across = start(runner, "many", 2, *STAGES, DATA, "--config.train.steps=8", devices=2, program=DATA_ACROSS)
    finish(runner, across)
    runner.run("many", *COMMON, *STAGES, DATA, devices=4)
    one, many = (
        {line["step"]: line["loss"] for line in runner.lines(workdir) if "loss" in line}
        for workdir in ("one", "many")
    )
    assert list(one) == list(range(1, STEPS + 1))
    assert many == pytest.approx(one, rel=1e-5)  # sums over devices and processes in other orders
