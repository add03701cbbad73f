"""Keeps the processes of a run together: start, loss, agreement, hangs, requests to stop, divergence."""

import faulthandler
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# Launchers that say how many processes they start: the variable that does, the others JAX finds them by,
# and how to get those.
_LAUNCHERS = {
    "SLURM_NTASKS": (
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"),
        "start the program with srun, which sets them",
    ),
    "OMPI_COMM_WORLD_SIZE": (
        ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        f"set {_ADDRESS}, {_COUNT} and {_INDEX} instead, as Open MPI 5 does not announce its coordinator",
    ),
}
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_STDERR = 2  # the descriptor: sys.stderr may be wrapped by a progress bar or a test
_NAMED = 10  # differences that a message spells out
_HEARTBEAT = 30  # seconds of silence after which JAX takes a process for lost; 100 unless told
_GRACE = 10.0  # seconds that a process which ends by an error leaves the others to come to the same error

# What a witness runs: it reads until the pipe ends, and an end without a word is that of a process cut short.
_WITNESS = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


class Diverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that was not finite."""


def start_distributed(
    address: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Connects the processes of a run, if there are several, and prints one line on each.

    The arguments, or else JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, win over what JAX
    detects (Slurm, Open MPI, Cloud TPU, Kubernetes); JAX_NUM_PROCESSES=1 alone detects nothing. Under Slurm
    and Open MPI JAX gives each process the GPU of its local number; list others in JAX_LOCAL_DEVICE_IDS.

    Raises:
        ValueError: several processes are announced, but a variable to connect them is missing or wrong.
    """
    given = {_ADDRESS: address, _COUNT: processes, _INDEX: process}
    launch = read_launch(dict(os.environ) | {k: str(v) for k, v in given.items() if v is not None})
    if launch is not None:
        try:
            jax.distributed.initialize(**launch, heartbeat_timeout_seconds=_HEARTBEAT)
        except ValueError as error:
            raise ValueError(
                f"The environment announces several processes, but JAX cannot connect them ({error}): set "
                f"{_ADDRESS}, {_COUNT} and {_INDEX}, or {_COUNT}=1 for a run of one process."
            ) from error
    here = jax.local_devices()
    print(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{len(here)} of {jax.device_count()} devices ({here[0].device_kind})",
        flush=True,
    )


def read_launch(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize` in an environment; None for a run of one process."""
    if environ.get(_COUNT) == "1":
        return None
    missing = [name for name in (_ADDRESS, _COUNT, _INDEX) if not environ.get(name)]
    if not missing:
        return _explicit(environ) | {"cluster_detection_method": "deactivate"}
    if _announces_several(environ):
        return _explicit(environ)
    if len(missing) < 3:
        present = ", ".join(f"{n}={environ[n]}" for n in (_ADDRESS, _COUNT, _INDEX) if n not in missing)
        raise ValueError(
            f"{present} is set but {' and '.join(missing)} is missing: set all three on every process, or "
            "none for a run of one process."
        )
    return None


def _explicit(environ: Mapping[str, str]) -> dict[str, Any]:
    """The arguments that are given, checked; JAX detects the others."""
    found: dict[str, Any] = {}
    if address := environ.get(_ADDRESS):
        if not address.rpartition(":")[2].isdigit() or ":" not in address:
            raise ValueError(f"{_ADDRESS}={address} has no port: give HOST:PORT of process 0, any free port.")
        found["coordinator_address"] = address
    for name, argument in ((_COUNT, "num_processes"), (_INDEX, "process_id")):
        if text := environ.get(name):
            if not text.isdigit():
                raise ValueError(f"{name}={text} is no count: give a whole number of 0 or more.")
            found[argument] = int(text)
    if len(found) == 3 and found["process_id"] >= found["num_processes"]:
        raise ValueError(
            f"{_INDEX}={found['process_id']} is outside 0..{found['num_processes'] - 1} of "
            f"{_COUNT}={found['num_processes']}: number the processes from 0."
        )
    return found


def _announces_several(environ: Mapping[str, str]) -> bool:
    """Whether there is something for JAX to detect."""
    for counter, (others, remedy) in _LAUNCHERS.items():
        if int(environ.get(counter) or 1) > 1:
            if missing := [name for name in others if name not in environ]:
                raise ValueError(
                    f"{counter}={environ[counter]} announces several processes but {' and '.join(missing)} "
                    f"is missing: {remedy}, or set {_COUNT}=1 for a run of one process."
                )
            return True
    # JAX sets this variable itself where there is no TPU, and whoever sets it on a TPU names the hosts.
    on_tpu = "TPU_SKIP_MDS_QUERY" not in environ or any(name in environ for name in _TPU_HOSTS)
    return on_tpu or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()


class Witness:
    """Ends a process of several soon after another is lost, and says what to do; a context manager.

    Enter it after `start_distributed`; one process needs none. JAX ends a process whose coordinator is gone,
    or whose peer has been silent for 30 seconds, from a thread below Python, and a killed process ends
    without a word. So a child that waits for the end of a pipe writes the sentence, whatever the end was.
    Only errors of XLA may have a lost peer for their reason; all others speak for themselves.

    After an error JAX would wait 5 minutes for processes that wait for this one; here it waits 10 seconds.
    """

    def __init__(self):
        """Has no child yet."""
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Starts the child, in a session of its own, as signals to the process group are not meant for it."""
        if jax.process_count() > 1:
            sentence = (
                f"Process {jax.process_index()} of {jax.process_count()} ended before its run was complete: "
                "it was killed, met the error above, or lost another process; start all processes again with "
                "the same command, and they go on from the last checkpoint.\n"
            )
            command = [sys.executable, "-ISc", _WITNESS, sentence]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Sends the child home, or bounds the wait for the others."""
        if self._child is None:
            return
        if not isinstance(error, jax.errors.JaxRuntimeError):
            self._child.communicate(b"the end is in order")
        if error is not None:
            deadline = threading.Timer(_GRACE, os._exit, [1])
            deadline.daemon = True  # or Python would wait for it
            deadline.start()


def agree(facts: Mapping[str, Any]) -> None:
    """Stops a run whose processes were started differently: they would compute wrong numbers, not fail.

    Args:
        facts: of the config, the versions and the parameter tree; compared as text. One process agrees.

    Raises:
        RuntimeError: on every process, naming the keys that differ and two values of each.
    """
    if jax.process_count() == 1:
        return
    mine = json.dumps({key: str(value) for key, value in facts.items()}, sort_keys=True).encode()
    digests = _gather(hashlib.sha256(mine).digest())
    if all(digest == digests[0] for digest in digests):
        return
    texts = _gather(mine.ljust(max(int(n) for n in _gather(b"%020d" % len(mine)))))
    wrong = _differences([json.loads(text) for text in texts])
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    raise RuntimeError(
        f"The processes of this run disagree: {'; '.join(wrong[:_NAMED])}{more}. Start every process with "
        "the same command, files and package versions."
    )


def _gather(mine: bytes) -> list[bytes]:
    """Bytes of the same length from every process, by process number."""
    rows = multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))
    return [np.asarray(row).tobytes() for row in rows]


def _differences(facts: list[dict[str, str]]) -> list[str]:
    found = []
    for key in sorted(set().union(*facts)):
        values = [fact.get(key, "absent") for fact in facts]
        other = next((n for n, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(f"{key} is {values[0]} on process 0 and {values[other]} on process {other}")
    return found


class Watchdog:
    """Ends the process, with the stack of every thread, when a step takes too long; a context manager.

    A hung main thread goes unnoticed by JAX, whose heartbeat is a thread of its own. This clock is a C thread
    that needs no Python lock, so it also ends a process that is blocked inside a library call.
    """

    def __init__(self, seconds: float, first: float):
        """Sets the deadlines.

        Args:
            seconds: that a step may take.
            first: that work which is known to be slow may take: compilation, saving, validation.
        """
        for name, value in (("seconds", seconds), ("first", first)):
            if not 0 < value < float("inf"):
                raise ValueError(
                    f"A watchdog with {name}={value} cannot be set: give a positive number of seconds, "
                    "a large one to be left alone."
                )
        self._seconds, self._first = seconds, first

    def __enter__(self) -> Self:
        """Starts with the generous deadline."""
        self.expect_slow()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the clock."""
        faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """Starts the clock again; call it after every step."""
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=_STDERR)

    def expect_slow(self) -> None:
        """Starts the clock again with the generous deadline, for what is not a step."""
        faulthandler.dump_traceback_later(self._first, exit=True, file=_STDERR)


class Preemption:
    """Turns a request to stop (SIGTERM, or the first Ctrl-C) into a step at which to save; a context manager.

    On one process that is the step at hand. On several, JAX hears of the SIGTERM that reaches any of them and
    names a step that none has passed yet. A second Ctrl-C ends the process at once. Enter it on the main
    thread, after `start_distributed`.
    """

    def __init__(self):
        """Chooses how processes agree."""
        self._asked = False
        if jax.process_count() > 1:  # SIGTERM stays with JAX, which handles it below Python
            self._reached = multihost_utils.reached_preemption_sync_point
            self._handlers = {signal.SIGINT: self._pass_on}
        else:
            self._reached = lambda step: self._asked
            self._handlers = {signal.SIGTERM: self._note, signal.SIGINT: self._note}
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Begins to listen."""
        self._previous = {number: signal.signal(number, f) for number, f in self._handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the handlers back that were there."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def requested(self, step: int) -> bool:
        """Whether to save now and stop; on several processes call it on all of them at every step."""
        return self._reached(step)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        name = signal.Signals(number).name
        # Not print: a handler may interrupt another print halfway.
        os.write(2, f"{name}: saving after this step, then stopping.\n".encode())
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        os.write(2, b"SIGINT: saving with the other processes, then stopping.\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def refuse_divergence(step: int, skipped_in_a_row: int, limit: int) -> None:
    """Ends a run that no longer learns.

    Args:
        step: batches seen, the skipped ones among them.
        skipped_in_a_row: of the latest batches, how many changed nothing.
        limit: how many are too many.

    Raises:
        Diverged: the limit is reached.
    """
    if skipped_in_a_row >= limit:
        raise Diverged(
            f"{skipped_in_a_row} steps in a row (limit {limit}) up to step {step} had a loss or gradient "
            f"that was not finite and were skipped; the last good step is {step - skipped_in_a_row}. "
            "Resume with a lower config.recipe.learning_rate, or look at the data of these steps."
        )
