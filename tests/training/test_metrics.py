"""What a run writes and shows: lines that survive kills, charts of anything, a bar or lines by stream."""

import io
import json
import math
import os
import struct
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dsv3_jax.training import charts, metrics, progress


@pytest.fixture
def log(tmp_path):
    return metrics.MetricsLog(tmp_path / "run" / "metrics.jsonl")


def lines_of(tmp_path):
    return (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()


@given(bits=st.integers(0, 2**32 - 1))
def test_every_float32_reads_back_bit_for_bit(tmp_path_factory, bits):
    value = np.array(bits, np.uint32).view(np.float32)
    log = metrics.MetricsLog(tmp_path_factory.mktemp("bits") / "metrics.jsonl")
    log.write(1, {"loss": value})
    back = log.read()[0]["loss"]
    if np.isnan(value):  # its payload is not kept
        assert math.isnan(back)
    else:
        assert struct.pack("<f", back) == struct.pack("<f", value)


def test_lines_with_non_finite_numbers_are_valid_json(log, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    log.write(1, {"loss": float("nan"), "grad_norm": np.float32("inf"), "x": -math.inf})
    line = json.loads(lines_of(tmp_path)[0], parse_constant=refuse)
    assert line == {"step": 1, "loss": "nan", "grad_norm": "inf", "x": "-inf"}
    assert [str(v) for v in log.read()[0].values()] == ["1", "nan", "inf", "-inf"]


def test_scalars_of_jax_numpy_and_python_are_written_alike(log):
    for one in (1, np.int64(1), jnp.int32(1)):
        log.write(1, {"skipped_steps": one, "loss": jnp.float32(0.1), "phase": "constant"})
    assert (
        log.read()
        == [{"step": 1, "skipped_steps": 1, "loss": float(np.float32(0.1)), "phase": "constant"}] * 3
    )


def test_a_metric_that_is_no_scalar_is_refused_by_name(log):
    with pytest.raises(ValueError, match=r"Metric load has shape \(2, 4\)"):
        log.write(1, {"load": np.zeros((2, 4))})


def test_a_killed_and_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path):
    def train(log, first, last):
        for step in range(first, last + 1):
            log.write(step, {"loss": 1 / step})
            if step % 4 == 0:
                log.write(step, {"val_loss": 2 / step})

    whole = metrics.MetricsLog(tmp_path / "whole.jsonl")
    train(whole, 1, 20)
    size = (tmp_path / "whole.jsonl").stat().st_size
    for killed_at in range(0, size, 37):  # the newest checkpoint is then of step 8, or none
        path = tmp_path / "killed.jsonl"
        path.write_bytes((tmp_path / "whole.jsonl").read_bytes()[:killed_at])
        log = metrics.MetricsLog(path)
        saved = 8 if any(line["step"] > 8 for line in log.read()) else 0
        log.resume(saved)
        train(log, saved + 1, 20)
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_resuming_without_a_file_writes_none(log, tmp_path):
    log.resume(10)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_damaged_line_in_the_middle_is_named(log, tmp_path):
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 2', '"ste\0: 2'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: .* is no metrics line"):
        log.resume(3)


def test_a_kill_while_resuming_leaves_the_old_file(log, tmp_path, monkeypatch):
    for step in (1, 2):
        log.write(step, {"loss": 1.0})

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        log.resume(1)
    assert len(lines_of(tmp_path)) == 2
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_files_written_atomically_are_readable_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        metrics.write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_events_hold_the_numbers_by_name(tmp_path):
    pytest.importorskip("tensorboardX")
    log = metrics.EventLog(tmp_path, step=0)
    log.write(1, {"main_loss": np.float32(2.5), "phase": "constant"})
    log.close()
    (events,) = tmp_path.iterdir()
    assert b"main_loss" in events.read_bytes()
    assert struct.pack("<f", 2.5) in events.read_bytes()
    assert b"phase" not in events.read_bytes()


def test_events_without_the_package_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ModuleNotFoundError, match=r"dsv3-jax\[tensorboard\]"):
        metrics.EventLog(tmp_path, step=0)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peak_flops_are_those_of_the_data_sheet_or_none(kind, flops):
    assert metrics.peak_flops(kind) == flops


def curve(steps):
    return [{"step": s, "loss": 2 + 4 / s} for s in range(1, steps + 1)]


NAN = [{"step": s, "loss": math.nan} for s in (1, 2)]
VALIDATED = [*curve(100), {"step": 50, "val_loss": 3.0}, {"step": 100, "val_loss": 2.5}]
LOAD = np.random.default_rng(0).poisson(50, (4, 16))


@pytest.mark.parametrize(
    ("lines", "load"),
    [
        ([], None),
        (curve(1), LOAD[:1, :1]),
        (NAN, np.zeros((2, 4))),
        ([*curve(100), *NAN], np.full((2, 4), np.nan)),
        (curve(30_000), np.ones((59, 256))),
        (VALIDATED, LOAD),
    ],
    ids=["nothing", "one point", "only nan", "some nan", "many", "usual"],
)
def test_any_run_has_a_chart_and_nothing_else_is_left(lines, load, tmp_path):
    charts.draw(tmp_path / "loss.png", lines, load, "tiny", {"unigram entropy": 4.9})
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (650, 1040 if load is None else 1690)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def pixels(path, colour):
    image = matplotlib.image.imread(path)[..., :3]
    return np.argwhere(np.abs(image - matplotlib.colors.to_rgb(colour)).max(-1) < 0.02)


def test_the_validation_curve_is_drawn_where_its_points_are(tmp_path):
    charts.draw(tmp_path / "without.png", curve(100), None, "tiny", {})
    charts.draw(tmp_path / "with.png", VALIDATED, None, "tiny", {})
    assert len(pixels(tmp_path / "without.png", "#d9480f")) == 0
    found = pixels(tmp_path / "with.png", "#d9480f")
    first, last = (found[found[:, 1] // 100 == column] for column in (5, 9))
    assert first[:, 0].mean() < last[:, 0].mean()  # rows count downwards: the loss of 3.0 stands above 2.5


def test_the_busiest_expert_is_the_darkest_cell(tmp_path):
    load = np.full((2, 4), 100)
    load[1, 3] = 400
    charts.draw(tmp_path / "loss.png", [], load, "tiny", {})
    rows, columns = pixels(tmp_path / "loss.png", "#67001f").T  # the red end of the colours
    cell = (rows > 325) & (columns < 1580)  # without the colour bar
    assert cell.sum() > 1000
    assert not ((rows < 300) & (columns < 1580)).any()


def test_training_loss_is_compared_without_the_terms_that_validation_lacks(tmp_path):
    both = [{"step": s, "loss": 9.0, "main_loss": 2 + 4 / s} for s in range(1, 101)]
    charts.draw(tmp_path / "both.png", both, None, "tiny", {})
    charts.draw(tmp_path / "main.png", curve(100), None, "tiny", {})
    assert (tmp_path / "both.png").read_bytes() == (tmp_path / "main.png").read_bytes()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_a_file_gets_one_plain_line_an_update(clock):
    out = io.StringIO()
    with progress.progress(100, 0, out) as shown:
        for step in (10, 20):
            shown.update(step, {"loss": np.float32(2.5), "tokens_per_second": 12_345.0})
            clock.seconds += 5
        shown.say("validation loss 2.4")
    assert out.getvalue().splitlines() == [
        "step 10/100  loss 2.5000  12.3k tok/s",  # no estimate before there is a pace without compilation
        "step 20/100  loss 2.5000  12.3k tok/s  40s left",
        "validation loss 2.4",
    ]


def test_the_time_left_ignores_what_went_before_the_first_update(clock):
    out = io.StringIO()
    with progress.progress(1000, 500, out) as shown:
        clock.seconds += 900  # compilation
        shown.update(510, {})
        clock.seconds += 10
        shown.update(520, {})
    assert out.getvalue().splitlines()[-1] == "step 520/1000  8m 00s left"


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left():
    out = Terminal()
    console = Console(file=out, force_terminal=True, width=120)
    with progress.LiveProgress(100, 0, console) as shown:
        shown.update(10, {"loss": 2.5, "tokens_per_second": 2e6})
        shown.say("[not markup]")
        shown.update(20, {"loss": 2.25, "tokens_per_second": 2e6})
    text = out.getvalue()
    assert all(word in text for word in ("step 20/100", "loss 2.2500", "2.0M tok/s", "left", "[not markup]"))


@pytest.mark.parametrize(
    ("stream", "kind"), [(Terminal(), progress.LiveProgress), (io.StringIO(), progress.Lines)]
)
def test_the_stream_decides_on_the_display(stream, kind):
    assert type(progress.progress(10, 0, stream)) is kind


def test_an_error_inside_leaves_the_cursor_visible():
    out = Terminal()
    with (
        pytest.raises(ZeroDivisionError),
        progress.LiveProgress(9, 0, Console(file=out, force_terminal=True)),
    ):
        raise ZeroDivisionError
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (442_800, "5d 03h")],
)
def test_durations_are_short(seconds, text):
    assert progress.duration(seconds) == text
