"""How long ranks of a pipeline work and wait in a step, each stage with its own layers.

What runs is what `dsv3_jax.pipeline.slots` runs: dense layers are computed again in the first stage's
backward, and the head and multi-token prediction run in the last stage's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.pipeline.placement import Placement
from dsv3_jax.pipeline.schedule import Action, Part, Place, Schedule, spans
from tools.planning.chips import Chip
from tools.planning.layer import REPORT, Again, Efficiency, LayerTimes, Passes, Precision


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step: a model, how it lies on devices, and its batch."""

    model: Config
    pipeline: int
    data: int
    expert: int
    microbatches: int
    batch_size: int  # sequences
    length: int  # positions of a sequence
    again: Again = REPORT

    def __post_init__(self):
        """Refuses what does not divide, naming every violation at once."""
        axes = self.data, self.expert, self.pipeline
        mesh.check_divides(self.model, self.batch_size, self.microbatches, *axes)

    @property
    def devices(self) -> int:
        """Of the whole mesh."""
        return self.pipeline * self.data * self.expert

    @property
    def tokens(self) -> int:
        """Of a micro-batch on a device."""
        return self.batch_size * self.length // (self.microbatches * self.data * self.expert)


class Machine(NamedTuple):
    """Devices, and how well a program in some precision uses them."""

    chip: Chip
    devices: int
    precision: Precision
    efficiency: Efficiency


class Spent(NamedTuple):
    """Seconds of an action, or of all of a rank's."""

    layers: float
    ends: float
    sends: float


def play(
    schedule: Schedule, where: Placement, work: Workload, times: LayerTimes, machine: Machine
) -> tuple[Spent, float]:
    """What ranks do in a step on average, and how long they wait for each other.

    Ranks start what they have all they need for, so that a slow stage holds up those that need its results.
    """
    spent = _spending(schedule.paths[0], where, work, times, machine)
    schedule = _by_stage(schedule)
    timeline = spans(schedule, lambda action: sum(spent(action)))
    whole = max(rank[-1].end for rank in timeline)
    actions = [spent(action) for program in schedule.programs for action in program]
    mean = Spent(*(sum(part) / schedule.ranks for part in zip(*actions, strict=True)))
    return mean, whole - sum(mean)


def _by_stage(schedule: Schedule) -> Schedule:
    """The same, each chunk named by its stage, so that an action tells how long it takes."""
    paths = tuple(tuple(Place(p.rank, stage) for stage, p in enumerate(path)) for path in schedule.paths)
    programs = (
        tuple(tuple(w._replace(chunk=schedule.stage(rank, w)) for w in action) for action in program)
        for rank, program in enumerate(schedule.programs)
    )
    return replace(schedule, paths=paths, programs=tuple(programs))


def _spending(
    path: Sequence[Place], where: Placement, work: Workload, times: LayerTimes, machine: Machine
) -> Callable[[Action], Spent]:
    """What an action takes whose chunks are the stages of a path; all paths have the same.

    Gradients of the ends' weights wait for nothing, but come with those of inputs.
    """
    layers = [int(where.counts[place]) for place in path]
    first, final = _ends(work, times, machine)
    alone, last = times.alone, len(path) - 1
    # Waited for, as in DeepSeek's code, which has received before it computes.
    send = work.tokens * work.model.d_model * 2 / _to_neighbour(work, machine)
    sends = [0.0, *(send * (here.rank != there.rank) for here, there in pairwise(path)), 0.0]  # into a stage
    seconds = {
        Part.FORWARD: alone.forward,
        Part.BACKWARD: alone.inputs + alone.weights,
        Part.BACKWARD_INPUT: alone.inputs,
        Part.BACKWARD_WEIGHT: alone.weights,
    }

    def spent(action: Action) -> Spent:
        layer, end, sent = 0.0, 0.0, 0.0
        for part, stage, _ in action:
            layer += layers[stage] * seconds[part]
            if part is Part.FORWARD:
                end += first.forward * (stage == 0)
                sent += sends[stage + 1]
            elif part is not Part.BACKWARD_WEIGHT:
                end += (first.inputs + first.weights) * (stage == 0) + sum(final) * (stage == last)
                sent += sends[stage]
        if len(action) > 1:
            both = min(layers[stage] for _, stage, _ in action)
            layer -= both * (sum(alone) - times.pair)
        return Spent(layer, end, sent)

    return spent


def _ends(work: Workload, times: LayerTimes, machine: Machine) -> tuple[Passes, Passes]:
    """Seconds before the first routed layer, and after the last; head and MTP's projection are in BF16."""
    c = work.model
    wider = c.d_dense / ((c.top_k + c.shared_experts) * c.d_expert)
    dense = Passes(*(a + wider * m for a, m in zip(times.attention, times.mlp, strict=True)))
    again = dense._replace(inputs=dense.inputs + dense.forward)
    product = 2 * work.tokens / (machine.chip.bf16 * machine.efficiency.head)
    head = product * c.d_model * (c.vocab * (1 + c.mtp_depth) + 2 * c.d_model * c.mtp_depth)
    return (
        Passes(*(c.dense_layers * seconds for seconds in again)),
        Passes(*(c.mtp_depth * seconds + head for seconds in times.alone)),
    )


def _to_neighbour(work: Workload, machine: Machine) -> float:
    """Bytes a second from stage to stage."""
    chip = machine.chip
    link = chip.neighbour if work.devices <= chip.domain else chip.slow_link
    return link * machine.efficiency.links
