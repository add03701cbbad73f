"""What a training step takes and holds on a machine, from the sizes of the model: no compiler, no device.

Weights are brought, and gradients returned, once a step, as `dsv3_jax.pipeline.slots` does it.

Not counted: embedding, the softmax of the loss, norm of gradients, input of data, memory of the compiler's
own, what ranks wait for each other beyond the schedule, and how one machine differs from another. How far it
is from the report's own run, term by term, is in `tests/tools/test_estimate.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from dsv3_jax.config import Config
from dsv3_jax.model import size
from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.pipeline.placement import placement
from dsv3_jax.pipeline.schedule import Schedule, peak_in_flight
from tools.planning.layer import LayerTimes, Multiplications, kept_bytes, visited
from tools.planning.play import Machine, Workload, play

Make = Callable[[int, int], Schedule]
"""A schedule of ranks and micro-batches."""

CATALOGUE: dict[str, Make] = {name: entry.make for name, entry in SCHEDULES.items()}


class Seconds(NamedTuple):
    """Of a step: the first four on average over ranks, the others on all alike."""

    layers: float  # routed ones, with the communication that nothing hides
    ends: float  # dense layers, head, and multi-token prediction
    sends: float  # of activations and their gradients to other stages
    idle: float  # waiting for other stages
    gather: float  # bringing weights to where they are used
    reduce: float  # bringing gradients back
    optimizer: float


class Bytes(NamedTuple):
    """That the device with most holds while micro-batches run."""

    parameters: float  # FP32 masters, a share of them
    optimizer: float  # both moments, a share of them
    weights: float  # as products read them
    gradients: float  # in FP32, added up over micro-batches
    activations: float  # kept for backward passes
    buffers: float  # tokens on the way to experts and back, of a forward and a backward


@dataclass(frozen=True)
class Estimate:
    """A step of a workload on a machine."""

    work: Workload
    machine: Machine
    seconds: Seconds
    memory: Bytes

    @property
    def step_seconds(self) -> float:
        """The sum of all terms."""
        return sum(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.work.batch_size * self.work.length / self.step_seconds

    @property
    def days_per_trillion(self) -> float:
        """Days that 10^12 tokens take."""
        return 1e12 / self.tokens_per_second / 86400

    @property
    def mfu(self) -> float:
        """Share of the BF16 peak, whatever the precision, as DeepSeek counts it (arXiv:2505.09343)."""
        flops = size.flops_per_token(self.work.model, self.work.length) * self.tokens_per_second
        return flops / self.work.devices / self.machine.chip.bf16

    @property
    def memory_bytes(self) -> float:
        """Of all kinds."""
        return sum(self.memory)

    @property
    def fits(self) -> bool:
        """Whether memory holds it, if a program needs nothing else."""
        return self.memory_bytes <= self.machine.chip.memory_bytes

    def device_hours(self, tokens: float = 14.8e12) -> float:
        """Of a training run; the report's has 14.8T tokens."""
        return tokens / self.tokens_per_second * self.work.devices / 3600

    def figures(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "days_per_trillion_tokens": self.days_per_trillion,
            "device_hours_for_14.8T_tokens": self.device_hours(),
            "mfu": self.mfu,
            "seconds": self.seconds._asdict(),
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "memory": self.memory._asdict(),
        }


class Comparison(NamedTuple):
    """Schedules, the fastest first, and why others cannot be."""

    estimates: dict[str, Estimate]
    impossible: dict[str, str]


def compare(
    work: Workload, times: LayerTimes, machine: Machine, makes: Mapping[str, Make] = CATALOGUE
) -> Comparison:
    """Estimates with each of these schedules.

    Raises:
        ValueError: if the mesh is not that of the machine.
    """
    _check(work, machine)
    estimates, impossible = {}, {}
    for name, make in makes.items():
        try:
            estimates[name] = estimate(work, make, times, machine)
        except ValueError as error:
            impossible[name] = str(error)
    return Comparison(dict(sorted(estimates.items(), key=lambda item: item[1].step_seconds)), impossible)


def estimate(work: Workload, make: Make, times: LayerTimes, machine: Machine) -> Estimate:
    """A step with a schedule.

    Args:
        work: what is trained, and how it lies on devices.
        make: the schedule, of ranks and micro-batches.
        times: of a routed layer, for the tokens of a micro-batch on a device.
        machine: what else runs on.

    Raises:
        ValueError: if the mesh is not that of the machine, or the schedule cannot be.
    """
    _check(work, machine)
    schedule = make(work.pipeline, work.microbatches)
    where = placement(schedule, work.model)
    held = _held(work, int(where.counts.sum(axis=1).max()))
    busy, idle = play(schedule, where, work, times, machine)
    kept = max(peak_in_flight(schedule)) * int(where.counts.max()) + work.model.mtp_depth
    seconds = Seconds(*busy, idle, *_moved(work, held, machine))
    return Estimate(work, machine, seconds, _memory(work, held, kept, machine))


def _check(work: Workload, machine: Machine) -> None:
    if work.devices != machine.devices:
        raise ValueError(
            f"config.mesh.pipeline={work.pipeline} x data={work.data} x expert={work.expert} are "
            f"{work.devices} devices but the machine has {machine.devices}: change the sizes so that their "
            "product is that."
        )


class _Held(NamedTuple):
    """Of a device's weights, by who needs the same: numbers, or their bytes."""

    experts: float  # other stages none, and those of the expert axis others
    rest: float  # all devices of a stage
    tables: float  # these too: embedding and head, which are in BF16 whatever the precision

    def bytes(self, number: float, in_tables: float) -> "_Held":
        """At so many bytes a number."""
        return _Held(number * self.experts, number * self.rest, in_tables * self.tables)


def _held(work: Workload, layers: int) -> _Held:
    """Of so many routed layers, and of both ends, which every rank holds."""
    c = work.model
    m = Multiplications.of(c, work.length)
    dense = c.dense_layers * (m.linears + 3 * c.d_model * c.d_dense)
    mtp = c.mtp_depth * (m.linears + m.shared + 2 * c.d_model**2)
    experts = (layers + c.mtp_depth) * _experts(c) / work.expert
    return _Held(experts, layers * (m.linears + m.shared) + dense + mtp, 2 * c.d_model * c.vocab)


def _experts(c: Config) -> float:
    return c.experts * 3 * c.d_model * c.d_expert


def _moved(work: Workload, held: _Held, machine: Machine) -> tuple[float, float, float]:
    """Seconds of the last three terms. Without stages a layer is brought for each pass, and then dropped."""
    gathers, reductions = (1, 1) if work.pipeline > 1 else (2 * work.microbatches, work.microbatches)
    gather = gathers * _spread(work, held.bytes(machine.precision.weight, 2), machine)
    reduce = reductions * _spread(work, held.bytes(4, 4), machine)
    # Adam reads a gradient, and reads and writes a master and two moments.
    touched = (4 + 2 * 4 + 4 * machine.precision.moment) * _share(work)
    return gather, reduce, touched / machine.chip.memory_bandwidth


def _spread(work: Workload, held: _Held, machine: Machine) -> float:
    """Seconds in which shards of these bytes become whole on each device, or gradients shards.

    What devices of a stage in one domain need alike comes to it once, and goes round in it at the same time.
    """
    chip, stage = machine.chip, work.data * work.expert
    experts = held.experts * (1 - 1 / (work.pipeline * work.data))
    rest = (held.rest + held.tables) * (1 - 1 / work.devices)
    if work.devices <= chip.domain:
        seconds = experts / min(chip.fast_link, chip.everyone(work.pipeline)) + rest / chip.fast_link
    else:
        alike = rest / min(chip.domain, stage)
        seconds = max((experts + alike) / chip.slow_link, rest / chip.fast_link)
    return seconds / machine.efficiency.links


def _share(work: Workload) -> float:
    """Parameters of a device between steps."""
    return _parameters(work.model) / work.devices


@cache
def _parameters(c: Config) -> int:
    return size.parameters(c) + size.mtp_parameters(c)


def _memory(work: Workload, held: _Held, kept: int, machine: Machine) -> Bytes:
    """Bytes; `kept` are layers in flight at the device with most."""
    c, precision = work.model, machine.precision
    share = _share(work)
    weights, gradients = sum(held.bytes(precision.weight, 2)), sum(held.bytes(4, 4))
    if work.pipeline == 1:  # one layer is whole at a time
        weights, gradients = precision.weight * share + weights / c.layers, 4 * share
    rows = visited(c, work.expert) * machine.efficiency.sent + c.top_k
    return Bytes(
        parameters=4 * share,
        optimizer=2 * precision.moment * share,
        weights=weights,
        gradients=gradients,
        activations=kept * work.tokens * kept_bytes(c, precision, work.again),
        buffers=2 * work.tokens * c.d_model * rows * (precision.dispatched + 2),
    )
