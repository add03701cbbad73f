"""What a config says, as frozen records: sizes, mesh, operations, recipe, data, and the numbers of a run."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections.config_dict import ConfigDict

from dsv3_jax import mesh, ops
from dsv3_jax.config import Config
from dsv3_jax.data import documents
from dsv3_jax.data.config import Data
from dsv3_jax.ops import dispatch, exchange, recompute
from dsv3_jax.ops.context import OVER_EXPERTS, WHOLE, Context
from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.pipeline.placement import placement
from dsv3_jax.pipeline.schedule import Schedule, limited
from dsv3_jax.training.recipe import Recipe
from dsv3_jax.training.step import Setup
from experiments.records import Refused, nearest, record, section

# The words of a config and the functions that they stand for; nothing inside the library knows the words.
PRECISIONS = {"float32": ops.float32, "bfloat16": ops.bfloat16, "fp8": ops.fp8}
RECOMPUTE = {
    "nothing": recompute.nothing,
    "norms_and_up_projections": recompute.norms_and_up_projections,
    "experts": recompute.experts,
    "everything": recompute.everything,
}
TRANSPORTS = {"scheduled": exchange.scheduled, "ragged": exchange.ragged, "direct": exchange.direct}
MOMENTS = {"float32": jnp.dtype(jnp.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}
ON_BAD = {"error": documents.refuse, "skip": documents.skip}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; the product of the first three is the number of devices."""

    pipeline: int = 1
    data: int = 1
    expert: int = 1
    context: int = 1  # devices of the expert axis that share a sequence: 1, or all of them


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How the parts of a batch go through the stages; without stages they run one after another."""

    schedule: str = "1f1b"
    microbatches: int = 1  # that a batch is split into
    # Micro-batches of a rank whose gradients of weights may wait; None for as many as the schedule lets wait.
    waiting: int | None = None

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        wrong = []
        if self.waiting is not None and self.waiting < 0:
            wrong.append(f"config.pipeline.waiting={self.waiting} must be 0 or more, or None for no limit.")
        if self.schedule not in SCHEDULES:
            wrong.append(
                f"config.pipeline.schedule={self.schedule!r} is none of {', '.join(SCHEDULES)}"
                f"{nearest(self.schedule, list(SCHEDULES))}."
            )
        if self.microbatches < 1:
            wrong.append(f"config.pipeline.microbatches={self.microbatches} must be above 0.")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """How tokens travel to their experts."""

    # For rows between two devices of the expert axis, as a multiple of a balanced load; what does not fit
    # goes in further rounds. None reserves room for any load.
    room: float | None = 2.0
    transport: str = "scheduled"  # or ragged or direct: what dsv3_jax/ops/exchange.py has
    hosts: int = 1  # that the expert axis spans, where a token is to cross to each host once

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        wrong = []
        if self.room is not None and not self.room > 0:
            wrong.append(f"config.dispatch.room={self.room} must be above 0, or None for that of any load.")
        if self.transport not in TRANSPORTS:
            wrong.append(
                f"config.dispatch.transport={self.transport!r} is none of {', '.join(TRANSPORTS)}"
                f"{nearest(self.transport, list(TRANSPORTS))}."
            )
        if self.hosts < 1:
            wrong.append(f"config.dispatch.hosts={self.hosts} must be above 0.")
        if self.hosts > 1 and self.transport == "direct":
            wrong.append(
                f"config.dispatch.transport=direct does not know of config.dispatch.hosts={self.hosts}: "
                "take scheduled or ragged, or one host."
            )
        if wrong:
            raise ValueError("\n".join(wrong))

    def dispatcher(self, model: Config) -> dispatch.AllToAll:
        """The transport of the operations."""
        way, groups = TRANSPORTS[self.transport], model.groups
        # A group of experts lies on one host, or on several that hold nothing else.
        nested = groups % self.hosts == 0 or self.hosts % groups == 0
        reached = model.top_groups * max(1, self.hosts // groups) if nested else self.hosts
        return dispatch.AllToAll(
            room=self.room, out=way, home=way, hosts=self.hosts, reached=min(reached, self.hosts)
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how much at once, and how often one looks."""

    steps: int = 240_000  # about 14.8T tokens with the report's batch ramp
    batch_size: int = 15_360  # sequences, after the ramp
    sequence_length: int = 4096
    seed: int = 0
    log_every: int = 10  # steps
    evaluate_every: int = 1000  # steps; 0 for only at the end
    evaluation_sequences: int = 512
    max_skipped: int = 10  # batches in a row without a finite loss and gradient, after which the run ends
    hang_seconds: float = 1800.0  # that a step may take
    slow_seconds: float = 7200.0  # that compilation, validation and saving may take

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        least = dict.fromkeys(f.name for f in dataclasses.fields(self)) | {"seed": 0, "evaluate_every": 0}
        wrong = [
            f"config.train.{name}={getattr(self, name)} must be {limit or 0} or more."
            if limit is not None
            else f"config.train.{name}={getattr(self, name)} must be above 0."
            for name, limit in least.items()
            if getattr(self, name) < 0 or (limit is None and getattr(self, name) == 0)
        ]
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How often the state is saved, in steps, and how many saved ones stay."""

    every: int = 500
    keep: int = 3

    def __post_init__(self):
        """Refuses numbers that save nothing."""
        if self.every < 1 or self.keep < 1:
            raise ValueError(
                f"config.checkpoint.every={self.every} and keep={self.keep} must both be 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a config decides; the defaults are DeepSeek-V3's own pretraining."""

    model: Config = Config()
    mesh: Mesh = Mesh()
    pipeline: Pipeline = Pipeline()
    dispatch: Dispatch = Dispatch()
    recipe: Recipe = Recipe()
    data: Data = Data()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    precision: str = "bfloat16"
    recompute: str = "norms_and_up_projections"
    moments: str = "bfloat16"
    # A run's work directory or converted weights that a fresh run has its weights and expert bias from; the
    # moments of the optimiser, the step and the place in the data begin anew.
    start_from: str | None = None
    # A tokenizer.json; None takes that of `start_from`, or trains a small one into the work directory.
    tokenizer: str | None = None
    tensorboard: bool = False

    def __post_init__(self):
        """Reports every violation at once, each with its key."""
        words = {"precision": PRECISIONS, "recompute": RECOMPUTE, "moments": MOMENTS}
        wrong = [
            f"config.{key}={getattr(self, key)!r} is none of {', '.join(table)}"
            f"{nearest(getattr(self, key), list(table))}."
            for key, table in words.items()
            if getattr(self, key) not in table
        ]
        sizes = self.mesh.data, self.mesh.expert, self.mesh.pipeline, self.mesh.context
        try:
            mesh.check_divides(self.model, self.train.batch_size, self.pipeline.microbatches, *sizes)
        except ValueError as error:
            wrong += str(error).splitlines()
        if self.mesh.pipeline > 1:
            try:
                schedule = make_schedule(self.pipeline.schedule, self.pipeline.waiting)
                placement(schedule(self.mesh.pipeline, self.pipeline.microbatches), self.model)
            except ValueError as error:
                wrong.append(f"config.mesh.pipeline={self.mesh.pipeline} cannot be used. {error}")
        if self.mesh.expert % self.dispatch.hosts:
            wrong.append(
                f"config.mesh.expert={self.mesh.expert} does not divide over config.dispatch.hosts="
                f"{self.dispatch.hosts}: choose a divisor."
            )
        if self.train.batch_size % self.data.shards:
            wrong.append(
                f"config.train.batch_size={self.train.batch_size} does not divide over "
                f"config.data.shards={self.data.shards}: choose a multiple."
            )
        if self.train.sequence_length % self.mesh.context:
            wrong.append(
                f"config.train.sequence_length={self.train.sequence_length} does not divide over "
                f"config.mesh.context={self.mesh.context}: choose a multiple."
            )
        if self.train.sequence_length > self.model.max_length:
            wrong.append(
                f"config.train.sequence_length={self.train.sequence_length} exceeds config.model.max_length="
                f"{self.model.max_length}: shorten it, or raise max_length with config.model.yarn set."
            )
        if wrong:
            raise ValueError("\n".join(wrong))

    @property
    def setup(self) -> Setup:
        """The static argument of the step."""
        remat, dispatcher = RECOMPUTE[self.recompute], self.dispatch.dispatcher(self.model)
        operations = PRECISIONS[self.precision](remat, dispatcher=dispatcher, context=self.context)
        schedule = make_schedule(self.pipeline.schedule, self.pipeline.waiting)
        return Setup(self.model, operations, self.recipe, MOMENTS[self.moments], schedule)

    @property
    def context(self) -> Context:
        """Where the positions of a sequence lie."""
        return WHOLE if self.mesh.context == 1 else OVER_EXPERTS

    @property
    def batch_multiple(self) -> int:
        """Sequences that every batch is a multiple of."""
        parts = self.mesh.data * self.mesh.expert // self.mesh.context
        return math.lcm(self.pipeline.microbatches * parts, self.data.shards)


@cache
def make_schedule(name: str, waiting: int | None) -> Callable[[int, int], Schedule]:
    """The schedule of ranks and micro-batches; the same function for the same arguments."""
    make = SCHEDULES[name].make
    return make if waiting is None else lambda *sizes: limited(make(*sizes), waiting)


def defaults() -> Any:
    """The config of DeepSeek-V3's pretraining, with every key there is; other configs change a few.

    A ConfigDict, typed so that a checker leaves its keys alone.
    """
    config: Any = section(Run())
    config.data.on_bad = "error"
    return config


def resolve(config: ConfigDict) -> Run:
    """The records of a config.

    Raises:
        Refused: with a line for everything that is wrong.
    """
    values: dict[str, Any] = config.to_dict()
    data = values.get("data")
    word = data.pop("on_bad", "error") if isinstance(data, dict) else "error"
    if word not in ON_BAD:
        raise Refused(f"config.data.on_bad={word!r} is neither of {', '.join(ON_BAD)}.")
    run = record(Run, values)
    return dataclasses.replace(run, data=dataclasses.replace(run.data, on_bad=ON_BAD[word]))


def make_mesh(run: Run) -> jax.sharding.Mesh:
    """The mesh of all devices, or a Refused that names the keys."""
    try:
        return mesh.make_mesh(run.mesh.pipeline, run.mesh.data, run.mesh.expert)
    except ValueError as error:
        raise Refused(str(error)) from None
