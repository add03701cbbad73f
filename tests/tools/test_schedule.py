"""The tool prints, writes and draws the schedule it is asked for."""

import json
import subprocess
import sys

import pytest
from matplotlib.patches import Rectangle

from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.pipeline.schedule import Costs
from tools.schedule import draw, report


def run(*arguments):
    command = [sys.executable, "-m", "tools.schedule", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line_writes_figures_and_a_picture(tmp_path):
    done = run(
        "--schedule=dualpipe", "--ranks=8", "--microbatches=20",
        f"--json={tmp_path}/schedule.json", f"--png={tmp_path}/schedule.png",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "66 units of time, of which a rank idles 6 " in done.stdout
    figures = json.loads((tmp_path / "schedule.json").read_text())
    assert figures["makespan"] == 66 and figures["bubble"] == figures["formula_bubble"] == 6
    assert figures["peak_in_flight"] == [9] * 8
    assert (figures["schedule"], figures["ranks"], figures["microbatches"]) == ("dualpipe", 8, 20)
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_that_cannot_be_is_refused_in_a_sentence(tmp_path):
    done = run("--schedule=dualpipe", "--ranks=8", "--microbatches=14", f"--json={tmp_path}/schedule.json")
    assert done.returncode == 1
    assert "micro-batches from 16 on" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--forward=nan", "give finite ones"), ("--json=missing/schedule.json", "choose another place")],
)
def test_bad_times_and_places_are_refused_in_a_sentence(flag, said):
    done = run(flag)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_slot_is_reported_and_ranks_do_one_thing_at_a_time(name):
    schedule = SCHEDULES[name].make(4, 8)
    costs = Costs(1, 1.5, 0.5, 2.5)
    slots = report(name, schedule, costs)["slots"]
    assert len(slots) == sum(len(program) for program in schedule.programs)
    for rank in range(4):
        mine = [slot for slot in slots if slot["rank"] == rank]
        numbers = [slot["slot"] for slot in mine]
        assert numbers == sorted(set(numbers))
        assert all(before["end"] <= after["start"] for before, after in zip(mine, mine[1:], strict=False))
    for slot in slots:
        for work in slot["work"]:
            place = schedule.paths[work["direction"]][work["stage"]]
            assert place.rank == slot["rank"]
            assert 0 <= work["microbatch"] < 8


def test_the_picture_has_a_block_for_every_work_and_a_legend():
    schedule = SCHEDULES["dualpipe"].make(4, 8)
    figure = draw("dualpipe", schedule, Costs())
    (axes,) = figure.axes
    blocks = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    works = sum(len(action) for program in schedule.programs for action in program)
    assert len(blocks) == schedule.ranks + works  # a background for each rank
    assert len(axes.texts) == works
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"forward", "backward, from the other end", "backward for weights", "idle"} <= set(named)
