"""The harness in several processes: each asks all, each gets what one process alone gets."""

import json
import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import jax
from pathlib import Path
processes, process, port, checkpoint = sys.argv[1:]
if processes == "2":
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from lm_eval.api.instance import Instance
from dsv3_jax import ops
from experiments.evaluation.adapter import Harness, Source
from experiments.scoring import mesh_of
with jax.set_mesh(mesh_of(1, 2)):
    lm = Harness(Source(Path(checkpoint), ops.float32(), 2, max_length=32))
    asked = [("the quick", " brown"), ("fox", " jumps over")]
    said = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked])
    kwargs = {"until": ["\\n"], "max_gen_toks": 6}
    text = lm.generate_until([Instance("generate_until", {}, ("the quick", kwargs), 0)])
    print("said", json.dumps([lm.rank, lm.world_size, said, text]))
"""


def started(processes, process, port, checkpoint):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(2 // processes)}
    line = [sys.executable, "-c", PROGRAM, str(processes), str(process), str(port), str(checkpoint)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def said(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    return json.loads(next(line for line in out.splitlines() if line.startswith("said"))[5:])


@pytest.mark.slow
def test_two_processes_with_half_of_the_experts_each_answer_as_one(checkpoint):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    both = [started(2, n, port, checkpoint) for n in range(2)]
    first, second = map(said, both)
    assert first == second and first[:2] == [0, 1]
    alone = said(started(1, 0, port, checkpoint))
    assert first[3] == alone[3]
    for (a, greedy), (b, alike) in zip(first[2], alone[2], strict=True):
        assert a == pytest.approx(b, abs=1e-4) and greedy == alike
