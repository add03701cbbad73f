"""In float64 a pipelined step gives the loss and every gradient of the whole model to ten digits.

What the library calls FP32 is FP64 in a process of its own: the same program, with rounding out of the way.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CASES = [
    ("gpipe", (1, 1, 2), 4),
    ("1f1b", (1, 2, 4), 8),
    ("zb1p", (2, 1, 4), 4),
    ("dualpipe", (1, 2, 4), 8),
    ("dualpipev", (1, 2, 2), 8),
]


def compare():
    """Prints the relative differences of each case, and the types that were compared."""
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    import jax.numpy as jnp
    import numpy as np

    jnp.float32 = jnp.float64  # before the library reads it
    from tests.conftest import SMALL
    from tests.parallel.test_pipeline import gradients

    c = dataclasses.replace(SMALL, layers=5, mtp_depth=1)
    whole = gradients(c, "1f1b", (1, 1), 1)
    assert {x.dtype for x in jax.tree.leaves((whole.loss, whole.parts, whole.grads))} == {np.dtype(float)}
    wanted = jax.tree.leaves((whole.loss, whole.parts, whole.grads))
    for case in CASES:
        got = gradients(c, *case)
        np.testing.assert_array_equal(got.load, whole.load)
        pairs = zip(jax.tree.leaves((got.loss, got.parts, got.grads)), wanted, strict=True)
        print(json.dumps([float(np.linalg.norm(g - w) / np.linalg.norm(w)) for g, w in pairs]))


@pytest.mark.slow
def test_all_schedules_are_exact_in_float64():
    command = [sys.executable, "-c", f"from {__name__} import compare; compare()"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CASES)
    for case, differences in zip(CASES, found, strict=True):
        assert len(differences) > 20
        assert max(differences) < 1e-10, case
