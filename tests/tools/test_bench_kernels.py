"""The benchmark times what is right, says why it does not time the rest, and reports what it timed."""

import json
import math
import subprocess
import sys

import pytest

from tools import bench_kernels as bench
from tools.bench_kernels import Ceilings, Row
from tools.kernel_benchmarks import Contender, same

CEILINGS = Ceilings(bf16=4e12, copy=1e12, sheet_bf16=8e12, sheet_fp8=16e12, sheet_copy=None)


def benchmark():
    return bench.small()[0]


def row(ours, rivals, **changes):
    plain = Row("a", 0.0, ours, rivals, {}, 8e6, 8e3, 0.0, ("XLA: x", "XLA: y", "XLA: absent"))
    return plain._replace(**changes)


def test_a_wrong_kernel_is_found_and_gets_no_time():
    right = benchmark()
    wrong = right._replace(ours=right.ours._replace(run=lambda x, w: 1.1 * right.ours.run(x, w)))
    measured = bench.measure(wrong)
    assert measured.error > bench.ACCEPTED
    assert measured.ours is None
    assert not measured.rivals
    assert measured.notes == {"ours": "wrong"}


def test_a_kernel_that_gives_no_number_is_wrong():
    right = benchmark()
    measured = bench.measure(
        right._replace(ours=right.ours._replace(run=lambda x, w: math.nan * right.ours.run(x, w)))
    )
    assert math.isnan(measured.error)
    assert measured.ours is None


def test_a_rival_that_fails_is_a_line_that_says_why(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no such unit\nand more")

    monkeypatch.setattr(bench, "_TURNS", 1)
    measured = bench.measure(benchmark()._replace(xla={"broken": Contender(same, refuse)}, torch={}))
    assert measured.ours is not None
    assert measured.ours > 0
    assert measured.notes == {"XLA: broken": "not run: NotImplementedError: no such unit"}
    assert any("no such unit" in line for line in bench.lines(measured, CEILINGS))


def test_programs_take_turns_and_the_median_counts(monkeypatch):
    clock = iter([0.5, 0.01, *[2, 9, 3, 4, 7, 8]])  # once each, to see how often; then three turns
    calls = []

    def once(run, repeats):
        calls.append((run(), repeats))
        return next(clock)

    monkeypatch.setattr(bench, "_once", once)
    medians = bench.in_turns({"a": lambda: "a", "b": lambda: "b"}, turns=3)
    assert calls == [("a", 1), ("b", 1)] + [("a", 1), ("b", 2)] * 3
    assert medians == {"a": 3, "b": 4}


def test_the_ratio_is_of_the_best_rival_of_xla():
    assert row(2.0, {"XLA: x": 5.0, "XLA: y": 3.0, "torch: z": 1.0}).ratio == 1.5
    assert row(2.0, {"torch: z": 1.0}).ratio is None
    assert row(None, {}).ratio is None


def test_the_geometric_mean_is_the_root_of_the_product():
    assert bench.geometric_mean([2.0, 8.0, 0.5]) == pytest.approx(2.0)
    assert math.isnan(bench.geometric_mean([]))


def test_rates_are_of_what_limits_the_shape():
    products = bench.lines(row(4e-6, {"XLA: x": 8e-6}), CEILINGS)
    assert "2.00 TFLOP/s ( 50% of measured,  25% of data sheet)" in products[1]
    assert "25% of measured" in products[2]
    assert "2.00x" in products[2]
    fp8 = bench.lines(row(4e-6, {}, fp8=1.0), CEILINGS)
    assert "( 50% of measured,  12% of data sheet)" in fp8[1]
    memory = bench.lines(row(4e-6, {}, flops=8e3, bytes=1e6), CEILINGS)
    assert "250.00 GB/s    ( 25% of measured)" in memory[1]


def test_the_command_writes_what_it_prints(tmp_path):
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "tools.bench_kernels", "--only=quantize by row", f"--device-json={file}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(file.read_text())
    assert [r["name"] for r in found["rows"]] == ["quantize by row of 512 x 1024"]
    assert found["rows"][0]["error"] == 0
    assert found["geometric_mean"] == pytest.approx(found["rows"][0]["ratio"])
    assert f"{found['geometric_mean']:.3f} times" in printed.splitlines()[-1]
    assert "say nothing about the kernels" in printed
