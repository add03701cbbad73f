"""Conversion holds a bounded amount of memory, however large the checkpoint is."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsv3_jax.interop import names
from dsv3_jax.interop.names import Storage
from tests.interop import released
from tests.interop.released import BF16, F32, TINY

REPOSITORY = Path(__file__).parents[2]
STATUS = Path("/proc/self/status")
LARGE = replace(
    TINY, d_model=1024, d_expert=1024, experts=96, vocab=40_000, d_dense=2048, mtp_depth=0, dense_layers=2
)
# Bands of 32 MB in FP32 at each stage of the way, and what libraries take at first use.
CONSTANT = 200e6  # bytes

MEASURED = r"""
import re, sys
from pathlib import Path
import jax.numpy as jnp
from tools import convert
source, destination = Path(sys.argv[2]), Path(sys.argv[3])

def high_water():  # of this process; getrusage would begin at what the parent had
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

before = high_water()
if sys.argv[1] == "from-hf":
    convert.from_hf(source, destination, jnp.dtype(jnp.bfloat16))
else:
    convert.to_hf(source, destination, convert.FORMS["bfloat16", "float32"], 10**8)
print("grew", high_water() - before)
"""


def grew(direction, source, destination):
    """Bytes by which the high-water mark of a fresh process rises during a conversion."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, direction, str(source), str(destination)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split("grew")[1])


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the high-water mark is read from /proc")
def test_memory_stays_below_twice_the_largest_tensor_and_a_constant(tmp_path):
    weights = {
        t.name: np.full(t.shape, 0.5, F32 if t.kind.storage is Storage.EXACT else BF16)
        for t in names.tensors(LARGE)
    }
    total, largest = (f(w.nbytes for w in weights.values()) for f in (sum, max))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(released.config(LARGE)))
    save_file(weights, source / "model.safetensors")
    del weights
    bound = 2 * largest + CONSTANT
    assert bound < total / 2  # otherwise holding everything would pass
    assert 0 < grew("from-hf", source, tmp_path / "ours") < bound
    assert 0 < grew("to-hf", tmp_path / "ours", tmp_path / "back") < bound
