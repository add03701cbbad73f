"""Checkpoints under kill -9, on a full disk, and shared by two processes; each in processes of its own."""

import itertools
import os
import random
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.training.weight_stream import WeightWriter

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import sys, time
import jax, jax.numpy as jnp
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.restore import CheckpointError
make = jax.jit(lambda i: {"w": jnp.full((512, 2048), i, jnp.float32) + jnp.arange(2048)[None]})
checkpoints = Checkpoints(sys.argv[1], keep=2, config={}, model_config={})
found = checkpoints.restore_newest(jax.eval_shape(make, 0), {})
start = 0
if found is not None:
    start = found.meta.step
    assert (found.weights["w"] == make(start)["w"]).all(), "not what was saved"
print("resumed at", start, flush=True)
"""


def program(tail, directory, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    code = PROGRAM + textwrap.dedent(tail)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_killed_at_any_moment_of_saving_resumes_from_a_complete_step(tmp_path):
    forever = """
    for step in range(start + 1, 100000):
        checkpoints.save(step, make(step), {}, {"0": "x" * 1000})
        print("began", step, flush=True)
    """
    choose, reached = random.Random(1), 0
    for _ in range(6):
        with program(forever, tmp_path) as child:
            limit = threading.Timer(60, child.kill)
            limit.start()
            assert child.stdout is not None
            lines = [child.stdout.readline(), child.stdout.readline()]
            time.sleep(choose.uniform(0, 0.3))
            child.kill()
            output, errors = child.communicate()
            limit.cancel()
        assert lines[0].startswith("resumed") and lines[1].startswith("began"), errors
        assert int(lines[0].split()[-1]) >= reached
        # save(n) waits for n - 1, so when n began n - 1 was complete. The last line may be half written.
        began = re.findall(r"began (\d+)\n", lines[1] + output)
        reached = int(began[-1]) - 1
    assert reached > 3


@pytest.mark.slow
def test_a_failed_save_surfaces_and_leaves_the_step_before_it(tmp_path):
    full = """
    import resource, signal
    checkpoints.save(1, make(1), {}, {})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    checkpoints.save(2, {"w": jax.random.bits(jax.random.key(0), (512, 2048)).astype(jnp.float32)}, {}, {})
    for _ in range(600):
        try:
            checkpoints.check_errors()
        except CheckpointError as error:
            print("surfaced", error, flush=True)
            break
        time.sleep(0.05)
    checkpoints.save(3, {"w": jnp.ones((4, 4))}, {}, {})
    checkpoints.close()
    print("closed", flush=True)
    """
    with program(full, tmp_path) as child:
        output, errors = child.communicate(timeout=60)
    assert "surfaced Saving step 2" in output and "newest complete step is 1" in output, errors
    assert "closed" in output
    assert sorted(os.listdir(tmp_path)) == ["1", "3"]


@pytest.mark.slow
def test_a_directory_that_vanishes_ends_the_run_with_an_error_and_not_a_hang(tmp_path):
    gone = """
    import os, shutil
    shutil.rmtree(sys.argv[1])
    open(sys.argv[1], "w").close()
    try:
        checkpoints.save(1, make(1), {}, {})
        checkpoints.wait()
    except CheckpointError as error:
        print("surfaced", error, flush=True)
    checkpoints.close()
    """
    with program(gone, tmp_path / "checkpoints") as child:
        output, errors = child.communicate(timeout=60)
    assert "surfaced Saving step 1" in output, errors


TWO = """
import os, sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
me = int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", num_processes=2, process_id=me)
from dsv3_jax.training import manifest
from dsv3_jax.training.checkpoint import Checkpoints

def init(i):
    w = jnp.full((8, 4), i, jnp.float32, out_sharding=jax.P(("data", "expert"), None))
    return {"w": w}, {"s": jnp.int32(i)}

def opened():
    return Checkpoints(sys.argv[1], keep=3, config={}, model_config={})

with jax.set_mesh(jax.make_mesh((1, 2, 2), ("pipeline", "data", "expert"))):
    make, abstract = jax.jit(init), jax.eval_shape(init, 0)
    with opened() as checkpoints:
        assert checkpoints.restore_newest(*abstract) is None
        for step in (1, 2):
            checkpoints.save(step, *make(step), {str(me): "position" * (me + step)})
    with opened() as checkpoints:
        found = checkpoints.restore_newest(*abstract)
        assert found.meta.data == {"0": "position" * 2, "1": "position" * 3}, found.meta.data
        assert found.meta.step == 2
    if me == 1:
        read = manifest.read
        def fails(path):
            if path.name == "2":
                raise manifest.Damaged("only this process cannot read it")
            return read(path)
        manifest.read = fails
    with opened() as checkpoints:
        found = checkpoints.restore_newest(*abstract)
        shards = [np.asarray(s.data) for s in found.weights["w"].addressable_shards]
        print("restored", found.meta.step, all((s == 1).all() for s in shards))
"""


def two(code, directory):
    """What two processes that know of each other print."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(directory), str(i), str(port)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    limit = threading.Timer(90, lambda: [child.kill() for child in children])
    limit.start()
    outcomes = [child.communicate() for child in children]
    limit.cancel()
    return outcomes


@pytest.mark.slow
def test_two_processes_choose_the_same_step_and_keep_both_loader_positions(tmp_path):
    for output, errors in two(TWO, tmp_path):
        assert "restored 1 True" in output, errors


HALVES = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
import tensorstore as ts
jax.config.update("jax_num_cpu_devices", 2)
me = int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", num_processes=2, process_id=me)
from dsv3_jax.training import arrays, restore
arrays._IN_FLIGHT = 16 << 20

def memory(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

with jax.set_mesh(jax.make_mesh((1, 1, 4), ("pipeline", "data", "expert"))):
    layout = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("expert"))
    jax.jit(lambda: jnp.zeros(8, out_sharding=jax.P("expert")))()  # what a compiler takes is not counted
    held = memory("VmRSS")
    one = jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32, sharding=layout)
    w = restore.load_weights(sys.argv[1], {"w": [one] * 12})["w"]
    (read,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    print("read", read["values"][0]["value"], "held", memory("VmHWM") - held)
    shards = [s for x in w for s in x.addressable_shards]
    expert = np.arange(1, 17)[:, None, None]
    print("right", all((np.asarray(s.data) == expert[s.index[0]]).all() for s in shards))
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_and_holds_its_own_experts_alone(tmp_path):
    weights = {"w": [jax.ShapeDtypeStruct((16, 1024, 1024), np.float32)] * 12}
    with WeightWriter(tmp_path / "w", weights, config={}, model_config={}) as writer:
        for layer, expert in itertools.product(range(12), range(16)):
            block = np.full((1, 1024, 1024), 1 + expert, np.float32)  # of zeros there is no file
            writer.write(f"w.{layer}", (slice(expert, expert + 1),), block)
    whole = 12 * 16 << 22
    for output, errors in two(HALVES, tmp_path / "w"):
        assert "right True" in output, errors
        read, held = map(int, re.findall(r"(?:read|held) (\d+)", output))
        assert whole // 2 <= read < 0.55 * whole
        assert held < whole, held  # what the allocator has not given back among it
