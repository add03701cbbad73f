"""Draws a pipeline schedule and says what it costs, without any device.

`python -m tools.schedule --schedule=dualpipe --ranks=8 --microbatches=20 [--png=FILE] [--json=FILE]`; what a
forward, the two halves of a backward, and an overlapped pair take can be given in any unit of time.
"""

import io
import json
import math
from pathlib import Path
from typing import Any

from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.pipeline.schedule import Costs, Part, Schedule, check, idle, peak_in_flight, spans
from dsv3_jax.training.metrics import write_atomically

_SCHEDULE = flags.DEFINE_enum("schedule", "dualpipe", sorted(SCHEDULES), "Which schedule.")
_RANKS = flags.DEFINE_integer("ranks", 8, "Devices along the pipeline axis.", lower_bound=1)
_MICROBATCHES = flags.DEFINE_integer("microbatches", 20, "Of one step.", lower_bound=1)
_FORWARD = flags.DEFINE_float("forward", 1, "What a forward takes.", lower_bound=0)
_INPUT = flags.DEFINE_float("backward_input", 1, "What gradients of inputs take.", lower_bound=0)
_WEIGHT = flags.DEFINE_float("backward_weight", 1, "What gradients of weights take.", lower_bound=0)
_OVERLAPPED = flags.DEFINE_float(
    "overlapped", 3, "What a forward and a backward take together.", lower_bound=0
)
_PNG = flags.DEFINE_string("png", None, "Where to draw it.")
_JSON = flags.DEFINE_string("json", None, "Where to write figures and all slots.")

_INK, _FAINT, _LINE = "#1f2937", "#f3f4f6", "white"
_COLOURS = {  # of the first chunk or direction, and of the second
    Part.FORWARD: ("#f4b860", "#fbe3bd"),
    Part.BACKWARD: ("#4f9d69", "#b9dcc4"),
    Part.BACKWARD_INPUT: ("#5aa9c9", "#bfe0ec"),
    Part.BACKWARD_WEIGHT: ("#8a7fc7", "#d3cfec"),
}
_NUMBERED_UP_TO = 160  # units of time; in longer pictures numbers would be specks
_WIDEST = 40.0  # inches


def main(argv: list[str]) -> None:
    """Prints the figures, and writes what is asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    costs = Costs(_FORWARD.value, _INPUT.value, _WEIGHT.value, _OVERLAPPED.value)
    try:
        schedule = SCHEDULES[_SCHEDULE.value].make(_RANKS.value, _MICROBATCHES.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if not all(map(math.isfinite, costs)) or not any(costs):
        raise app.UsageError(f"{costs} are no times to compare: give finite ones, of which one is above 0.")
    check(schedule)
    figures = report(_SCHEDULE.value, schedule, costs)
    print(
        f"{figures['schedule']} over {schedule.ranks} ranks, {schedule.microbatches} micro-batches: "
        f"{figures['makespan']:g} units of time, of which a rank idles {figures['bubble']:g} "
        f"({100 * figures['bubble'] / (figures['makespan'] or 1):.1f}%; the report's formula gives "
        f"{figures['formula_bubble']:g}).\n"
        f"In flight at most, by rank: {' '.join(map(str, figures['peak_in_flight']))}."
    )
    if _JSON.value:
        _write(_JSON.value, json.dumps(figures, indent=1).encode())
    if _PNG.value:
        png = io.BytesIO()
        draw(_SCHEDULE.value, schedule, costs).savefig(png, format="png")
        _write(_PNG.value, png.getvalue())


def _write(path: str, content: bytes) -> None:
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise app.UsageError(f"{path} cannot be written ({error.strerror}): choose another place.") from error


def report(name: str, schedule: Schedule, costs: Costs) -> dict[str, Any]:
    """What JSON holds: times in the unit of the costs; the bubble is that of the rank that idles most."""
    timeline = spans(schedule, costs.of)
    slots = spans(schedule, lambda action: 1)
    return {
        "schedule": name,
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "costs": costs._asdict(),
        "makespan": max(rank[-1].end for rank in timeline),
        "bubble": max(idle(schedule, costs)),
        "formula_bubble": SCHEDULES[name].bubble(schedule.ranks, costs),
        "peak_in_flight": peak_in_flight(schedule),
        "slots": [
            {
                "rank": rank,
                "slot": int(slots[rank][index].start),
                "start": timeline[rank][index].start,
                "end": timeline[rank][index].end,
                "work": [
                    {
                        "part": work.part,
                        "microbatch": work.microbatch,
                        "stage": schedule.stage(rank, work),
                        "direction": schedule.direction(work.microbatch),
                    }
                    for work in action
                ],
            }
            for rank, program in enumerate(schedule.programs)
            for index, action in enumerate(program)
        ],
    }


def draw(name: str, schedule: Schedule, costs: Costs) -> Figure:
    """Ranks downwards and time across, each block with the number of its micro-batch; pairs share a block."""
    timeline = spans(schedule, costs.of)
    end = max(rank[-1].end for rank in timeline)
    width = min(_WIDEST, max(9.0, 0.24 * end / min(filter(None, costs), default=1)))
    figure = Figure(figsize=(width, 1.5 + 0.36 * schedule.ranks), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    numbered = end <= _NUMBERED_UP_TO * max(costs.forward, costs.backward_input)
    for rank, program in enumerate(schedule.programs):
        axes.add_patch(Rectangle((0, rank), end, 1, facecolor=_FAINT, edgecolor="none"))
        for action, span in zip(program, timeline[rank], strict=True):
            height = 1 / len(action)
            for i, work in enumerate(action):
                colour = _COLOURS[work.part][work.chunk]
                corner, across = (span.start, rank + i * height), span.end - span.start
                axes.add_patch(
                    Rectangle(corner, across, height, facecolor=colour, edgecolor=_LINE, linewidth=0.8)
                )
                if numbered:
                    middle = (corner[0] + across / 2, corner[1] + height / 2)
                    size = 7 if len(action) == 1 else 5.5
                    axes.annotate(
                        str(work.microbatch), middle, color=_INK, fontsize=size, ha="center", va="center"
                    )
    bubble = max(idle(schedule, costs))
    axes.set_title(
        f"{name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches; idle {bubble:g} of {end:g}",
        loc="left",
        color=_INK,
        fontsize=11,
    )
    _frame(axes, schedule, end)
    _legend(figure, schedule)
    return figure


def _frame(axes: Axes, schedule: Schedule, end: float) -> None:
    axes.set(xlim=(0, end), ylim=(schedule.ranks, 0), xlabel="time")
    axes.set_yticks([rank + 0.5 for rank in range(schedule.ranks)], map(str, range(schedule.ranks)))
    axes.set_ylabel("rank", color=_INK)
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.spines[:].set_visible(False)


def _legend(figure: Figure, schedule: Schedule) -> None:
    """The parts and chunks that occur."""
    used = {(work.part, work.chunk) for program in schedule.programs for action in program for work in action}
    second = "from the other end" if len(schedule.paths) > 1 else "on the way back"
    names = {
        Part.FORWARD: "forward",
        Part.BACKWARD: "backward",
        Part.BACKWARD_INPUT: "backward for inputs",
        Part.BACKWARD_WEIGHT: "backward for weights",
    }
    handles = [
        Patch(facecolor=_COLOURS[part][chunk], label=names[part] + (f", {second}" if chunk else ""))
        for part in Part
        for chunk in (0, 1)
        if (part, chunk) in used
    ]
    handles.append(Patch(facecolor=_FAINT, label="idle"))
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=8)


if __name__ == "__main__":
    app.run(main)
