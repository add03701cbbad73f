"""Absent GPUs: what their links carry, and a step that is compiled for them."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.kernels.hopper_compiler import needs_cuda_plugin
from tests.tools.test_plan import MESH, plan
from tools.planning import hopper
from tools.planning.chips import CHIPS

CHIP = CHIPS["h200"]


def grid(pipeline, data, expert) -> Any:
    numbers = np.arange(pipeline * data * expert).reshape(pipeline, data, expert)
    devices = np.vectorize(lambda n: SimpleNamespace(process_index=n // 8), otypes=[object])(numbers)
    shape = dict(pipeline=pipeline, data=data, expert=expert)
    return SimpleNamespace(devices=devices, shape=shape, axis_names=tuple(shape))


def test_inside_a_host_all_goes_over_nvlink():
    rates = hopper.links(grid(1, 1, 8), CHIP)
    np.testing.assert_allclose(rates["expert"], CHIP.fast_link)


def test_across_hosts_the_slower_part_of_an_exchange_decides():
    rates = hopper.links(grid(2, 2, 16), CHIP)
    np.testing.assert_allclose(rates["expert"], CHIP.slow_link * 15 / 8)
    np.testing.assert_allclose([rates["data"], rates["pipeline"]], CHIP.slow_link)


def test_hosts_that_are_not_full_are_refused():
    with pytest.raises(ValueError, match="12 devices of h200 do not fill hosts of 8: choose a multiple of 8"):
        hopper.devices(CHIP, 12)


@needs_cuda_plugin
def test_hopper_compiles_a_step_that_is_planned(tmp_path):
    path = tmp_path / "plan.json"
    done = plan("--config=tiny", "--topology=h200:8", "--config.precision=bfloat16", *MESH, f"--json={path}")
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(path.read_text())
    assert figures["device"] == {"kind": "h200", "count": 8, "memory_bytes": CHIP.memory_bytes}
    assert figures["memory"]["fits"] and figures["flops"] > 0 and not figures["not_counted"]
    assert figures["collectives"]["expert_all_to_all"]["asynchronous"] > 0
