"""Processes start from their environment, agree, stop together, and do not hang; in real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from dsv3_jax.training import runtime
from tests.conftest import ROOT

ALL = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
ALONE = {"TPU_SKIP_MDS_QUERY": "1"}  # what JAX sets on a machine without TPUs


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


def test_a_bare_environment_is_one_process():
    assert runtime.read_launch(ALONE) is None


def test_the_three_variables_win_over_slurm():
    assert runtime.read_launch(ALONE | SLURM | ALL) == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    "announced",
    [
        SLURM,
        {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        },
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
    ids=["slurm", "open mpi", "gke tpu", "kubernetes"],
)
def test_jax_detects_what_a_launcher_announces(announced):
    assert runtime.read_launch(ALONE | announced) == {}


def test_on_a_tpu_jax_asks_the_metadata_server():
    assert runtime.read_launch({}) == {}


def test_an_address_given_beside_slurm_is_kept():
    address = {"JAX_COORDINATOR_ADDRESS": "host:1"}
    assert runtime.read_launch(ALONE | SLURM | address) == {"coordinator_address": "host:1"}


@pytest.mark.parametrize(
    "announced", [{}, SLURM, {"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}]
)
def test_a_count_of_one_is_one_process_whatever_is_announced(announced):
    assert runtime.read_launch(announced | {"JAX_NUM_PROCESSES": "1"}) is None


def test_slurm_with_one_task_is_one_process():
    assert runtime.read_launch(ALONE | SLURM | {"SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize("name", ALL)
def test_a_half_set_environment_names_what_is_missing(name):
    with pytest.raises(ValueError, match=f"is set but {name} is missing: set all three") as refused:
        runtime.read_launch(ALONE | without(ALL, name))
    assert all(f"{n}={v}" in str(refused.value) for n, v in without(ALL, name).items())


def test_two_missing_variables_are_both_named():
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID is missing"):
        runtime.read_launch(ALONE | {"JAX_NUM_PROCESSES": "2"})


@pytest.mark.parametrize("name", without(SLURM, "SLURM_NTASKS"))
def test_sbatch_without_srun_names_what_is_missing(name):
    with pytest.raises(ValueError, match=f"SLURM_NTASKS=2 .* but {name} is missing: .* srun"):
        runtime.read_launch(ALONE | without(SLURM, name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS=host has no port"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is no count"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1 is no count"),
        ({"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID=4 is outside 0\.\.3"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        runtime.read_launch(ALONE | ALL | change)


def test_one_process_says_what_it_has(monkeypatch, capsys):
    for name in [*ALL, *SLURM, "KUBERNETES_SERVICE_HOST"]:
        monkeypatch.delenv(name, raising=False)
    runtime.start_distributed()
    assert re.fullmatch(r"process 0 of 1 on \S+: 8 of 8 devices \(cpu\)\n", capsys.readouterr().out)


def test_one_process_agrees_with_itself():
    runtime.agree({"config.train.seed": float("nan")})


# Gloo writes into standard output in pieces, in the middle of lines of Python.
ALONE_IN_OUTPUT = """
import os, sys
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
"""


def start(script, environ=None, **keywords):
    """A child in a session of its own, on two CPU devices, stderr with what Python prints."""
    clean = without(os.environ, *ALL, *SLURM)
    clean |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)} | ALONE
    return subprocess.Popen(
        [sys.executable, "-c", ALONE_IN_OUTPUT + script],
        env=clean | (environ or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **keywords,
    )


def finish(*children, seconds=60):
    """What the children print; whatever happens, none of their processes stays."""
    try:
        texts = [child.communicate(timeout=seconds)[0] for child in children]
    finally:
        for child in children:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            child.stdout.close()
    return [text.rstrip("\n") for text in texts]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


PAIR = """
import os, signal, time
import jax
from dsv3_jax.training import runtime

runtime.start_distributed()
me = jax.process_index()
runtime.agree({"config.train.seed": 1, "jax": jax.__version__})
print("agreed", flush=True)
begin = time.monotonic()
try:
    runtime.agree({"config.train.seed": 1, "config.recipe.learning_rate": [0.1, 0.2][me], f"only.{me}": "x"})
except RuntimeError as error:
    print(error, flush=True)
print(f"took {time.monotonic() - begin}", flush=True)
with runtime.Preemption() as preemption:
    for step in range(600):
        time.sleep([0.02, 0.05][me])
        if step == 5 and me == 1:
            os.kill(os.getpid(), signal.SIGNAL)
        if preemption.requested(step):
            print(f"saved at step {step}", flush=True)
            break
"""


@pytest.fixture(scope="module")
def explicit_pair():
    """Started by the three variables, stopped by SIGTERM to one process."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    script = PAIR.replace("SIGNAL", "SIGTERM")
    children = [start(script, shared | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    texts = finish(*children)
    return texts, [child.returncode for child in children]


@pytest.fixture(scope="module")
def slurm_pair():
    """Started like tasks of srun, stopped by Ctrl-C in one process."""
    shared = SLURM | {"JAX_COORDINATOR_PORT": str(free_port())}
    script = PAIR.replace("SIGNAL", "SIGINT")
    children = [start(script, shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    texts = finish(*children)
    return texts, [child.returncode for child in children]


@pytest.mark.parametrize("pair", ["explicit_pair", "slurm_pair"])
def test_each_process_says_which_it_is(pair, request):
    texts, _ = request.getfixturevalue(pair)
    for i, text in enumerate(texts):
        assert re.search(rf"^process {i} of 2 on \S+: 2 of 4 devices \(cpu\)$", text, re.M), text


def test_processes_with_the_same_facts_go_on(explicit_pair):
    assert all("agreed" in text for text in explicit_pair[0]), explicit_pair


def test_both_processes_name_the_keys_that_differ_and_their_values(explicit_pair):
    for text in explicit_pair[0]:
        assert "config.recipe.learning_rate is 0.1 on process 0 and 0.2 on process 1" in text
        assert "only.0 is x on process 0 and absent on process 1" in text
        assert "config.train.seed" not in text


def test_disagreement_is_found_within_ten_seconds(explicit_pair):
    assert all(float(re.search("took (.*)", text)[1]) < 10 for text in explicit_pair[0])


@pytest.mark.parametrize("pair", ["explicit_pair", "slurm_pair"])
def test_a_signal_to_one_process_saves_the_same_step_on_both(pair, request):
    texts, codes = request.getfixturevalue(pair)
    assert codes == [0, 0], texts
    steps = {re.search(r"saved at step (\d+)", text)[1] for text in texts}
    assert len(steps) == 1


def test_a_launcher_that_jax_does_not_find_ends_in_one_sentence():
    announced = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}  # on a machine without TPUs
    (text,) = finish(start("from dsv3_jax.training import runtime; runtime.start_distributed()", announced))
    assert "ValueError: The environment announces several processes, but JAX cannot connect them" in text


HANG = """
import ctypes, time
from dsv3_jax.training import runtime

def the_function_that_hangs():
    HOW

with runtime.Watchdog(seconds=1, first=60) as watchdog:
    watchdog.step()
    the_function_that_hangs()
"""


@pytest.mark.parametrize(
    "how", ["time.sleep(100)", "ctypes.PyDLL(None).sleep(100)"], ids=["in python", "in c, holding the lock"]
)
def test_a_hung_step_prints_where_it_hangs_and_ends_the_process(how):
    begin = time.monotonic()
    child = start(HANG.replace("HOW", how))
    (text,) = finish(child)
    assert child.returncode == 1
    assert "in the_function_that_hangs" in text
    assert time.monotonic() - begin < 40


def test_a_watchdog_lets_steps_and_slow_work_pass():
    script = """
import time
from dsv3_jax.training import runtime
with runtime.Watchdog(seconds=2, first=60) as watchdog:
    time.sleep(2.5)  # compilation
    for _ in range(3):
        watchdog.step()
        time.sleep(0.8)
    watchdog.expect_slow()
time.sleep(2.5)  # after the run
print("done")
"""
    child = start(script)
    assert finish(child) == ["done"]
    assert child.returncode == 0


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_watchdog_that_cannot_wait_is_refused(seconds):
    with pytest.raises(ValueError, match=f"seconds={seconds}"):
        runtime.Watchdog(seconds, first=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_save_and_the_handlers_come_back(number):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with runtime.Preemption() as preemption:
        assert not preemption.requested(1)
        os.kill(os.getpid(), number)
        assert preemption.requested(2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


LOOP = """
import time
from dsv3_jax.training import runtime
with runtime.Preemption() as preemption:
    print("ready", flush=True)
    while not preemption.requested(0):
        time.sleep(0.01)
    EXTRA
print("saved")
"""


def test_sigterm_lets_the_run_save_and_exit_with_zero():
    child = start(LOOP.replace("EXTRA", "pass"))
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    (text,) = finish(child)
    assert text.splitlines() == ["SIGTERM: saving after this step, then stopping.", "saved"]
    assert child.returncode == 0


def test_a_second_ctrl_c_stops_at_once_even_inside_a_library_call():
    child = start(
        LOOP.replace("EXTRA", "import ctypes; print('saving', flush=True); ctypes.PyDLL(None).sleep(100)")
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert "SIGINT" in child.stdout.readline()
    assert child.stdout.readline() == "saving\n"
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    (text,) = finish(child)
    assert child.returncode == -signal.SIGINT
    assert "saved" not in text
    assert time.monotonic() - begin < 10


def test_skips_below_the_limit_go_on():
    runtime.refuse_divergence(step=120, skipped_in_a_row=9, limit=10)


def test_too_many_skips_name_the_limit_the_step_and_the_last_good_one():
    with pytest.raises(runtime.Diverged, match=r"limit 10\) up to step 120 .* last good step is 110"):
        runtime.refuse_divergence(step=120, skipped_in_a_row=10, limit=10)
