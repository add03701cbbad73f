"""Says what a big run would need and take, without the machine.

    python -m tools.plan --config=deepseek_v3 --topology=v5p:8x8x16 --config.mesh.pipeline=16 \
        --config.mesh.expert=64 --config.pipeline.microbatches=240 --config.pipeline.waiting=0 \
        --config.recompute=experts --config.dispatch.room=1.25 --config.dispatch.transport=direct \
        [--json=FILE] [--html=FILE]

compiles the real training step for that machine and reads memory, collectives and what hides them from the
program. The extra [tpu] brings the compiler, and [cuda] that for GPUs, as in `--topology=h200:64`; neither
needs a device. `--analytic` needs no compiler: it computes the step from the model's sizes, with every
schedule. The report's own run:

    python -m tools.plan --analytic --topology=h800:2048 --kernels=measured --config.precision=fp8 \
        --config.mesh.pipeline=16 --config.mesh.data=2 --config.mesh.expert=64 \
        --config.pipeline.schedule=dualpipe --config.pipeline.microbatches=120
"""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections.config_dict import ConfigDict

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model import size
from dsv3_jax.pipeline.catalogue import SCHEDULES
from dsv3_jax.training.metrics import write_atomically
from experiments import settings
from experiments.records import Refused
from experiments.run import Run, make_schedule, resolve
from tools.planning import aot, hopper, page
from tools.planning.chips import Chip, topology
from tools.planning.estimate import compare, estimate
from tools.planning.layer import (
    BFLOAT16,
    FP8,
    PEAK,
    RECOMPUTED,
    REPORT,
    Again,
    from_peaks,
    measured_h800,
    reached,
    visited,
)
from tools.planning.play import Machine, Workload
from tools.planning.program import Program, Rates, read

_TOPOLOGY = flags.DEFINE_string(
    "topology", "v5p:8x8x16", "The machine: v5p, v6e or tpu7x:XxYxZ, or h100, h200 or h800:DEVICES."
)
_ANALYTIC = flags.DEFINE_bool("analytic", False, "Compute from sizes, without a compiler.")
_KERNELS = flags.DEFINE_enum(
    "kernels",
    "peak",
    ["peak", "deepseek", "measured"],
    "Of the analytic mode: all at their peak, at DeepSeek's shares of it, or as DeepSeek timed them on H800.",
)
_JSON = flags.DEFINE_string("json", None, "Where to write all figures.")
_HTML = flags.DEFINE_string("html", None, "Where to write a page with all figures.")

TOKENS = 14.8e12  # of the report's pretraining
CONFIG = Config()  # DeepSeek-V3's sizes
PRECISIONS = {"bfloat16": BFLOAT16, "fp8": FP8}


def main(name: str, config: ConfigDict) -> None:
    """Prints the figures, and writes what is asked for."""
    chip, devices = topology(_TOPOLOGY.value)
    run = resolve(config)
    figures = analytic(run, chip, devices) if _ANALYTIC.value else compiled(run, chip, _TOPOLOGY.value)
    figures = {"config": name, "topology": _TOPOLOGY.value, **figures}
    print(page.words(figures))
    if _JSON.value:
        _write(_JSON.value, json.dumps(figures, indent=1).encode())
    if _HTML.value:
        _write(_HTML.value, page.html(figures).encode())


def analytic(run: Run, chip: Chip, devices: int) -> dict[str, Any]:
    """Figures computed from sizes, and all schedules side by side.

    Raises:
        Refused: if the mesh is not that of the machine, or the schedule cannot be.
    """
    if run.mesh.context > 1:
        raise Refused(
            f"config.mesh.context={run.mesh.context} is known to the compiler alone: leave out --analytic, "
            "or set it to 1."
        )
    sizes, machine = run.mesh, _machine(run, chip, devices)
    work = Workload(
        model=run.model,
        pipeline=sizes.pipeline,
        data=sizes.data,
        expert=sizes.expert,
        microbatches=run.pipeline.microbatches,
        batch_size=run.train.batch_size,
        length=run.train.sequence_length,
        again=_again(run),
    )
    shape = run.model, sizes.expert, work.tokens, work.length
    if _KERNELS.value != "measured":
        times = from_peaks(*shape, chip, machine.precision, machine.efficiency, work.again)
    elif (*shape, chip.kind, run.precision, work.again) == (CONFIG, 64, 4096, 4096, "h800", "fp8", REPORT):
        times = measured_h800()
    else:
        raise Refused(
            f"--kernels=measured is of FP8 on h800, DeepSeek-V3's sizes, 64 devices for the experts and 4096 "
            f"tokens a micro-batch, not of {run.precision} on {chip.kind}, {sizes.expert} devices and "
            f"{work.tokens} tokens with config.recompute={run.recompute}: choose --kernels=deepseek or peak."
        )
    makes = {name: make_schedule(name, run.pipeline.waiting) for name in SCHEDULES}
    try:
        estimates, impossible = compare(work, times, machine, makes)
        chosen = estimate(work, makes[run.pipeline.schedule], times, machine)
    except ValueError as error:
        raise Refused(str(error)) from None
    memory = {"peak_bytes": chosen.memory_bytes, "fits": chosen.fits, "by_kind": chosen.memory._asdict()}
    return {
        "device": {"kind": chip.kind, "count": devices, "memory_bytes": chip.memory_bytes},
        "memory": memory,
        "collectives": {},
        "terms": chosen.seconds._asdict(),
        "layer": times._asdict(),
        "step_seconds_bound": chosen.step_seconds,
        "tokens_per_second_bound": chosen.tokens_per_second,
        "mfu_bound": chosen.mfu,
        "days_for_1T_tokens": chosen.days_per_trillion,
        "device_hours_for_14.8T_tokens": chosen.device_hours(TOKENS),
        "schedules": [{"schedule": name, **one.figures()} for name, one in estimates.items()],
        "impossible": impossible,
    }


def _again(run: Run) -> Again:
    if run.recompute not in RECOMPUTED:
        raise Refused(
            f"config.recompute={run.recompute} is known to the compiler alone: leave out --analytic, or set "
            f"one of {', '.join(RECOMPUTED)}."
        )
    return RECOMPUTED[run.recompute]


def _machine(run: Run, chip: Chip, devices: int) -> Machine:
    """Devices and what their kernels reach. Unused room is sent too; a TPU needs no core for sending."""
    if run.precision not in PRECISIONS:
        raise Refused(
            f"config.precision={run.precision} is not one that accelerators train in: choose one of "
            f"{', '.join(PRECISIONS)}."
        )
    precision = replace(PRECISIONS[run.precision], moment=run.setup.moments.itemsize)
    efficiency = PEAK if _KERNELS.value == "peak" else reached()
    if chip.dimensions:
        efficiency = replace(efficiency, cores=1.0)
        needed = visited(run.model, run.mesh.expert)
        efficiency = replace(efficiency, sent=max(1.0, (run.dispatch.room or 1.0) * run.model.top_k / needed))
    return Machine(chip, devices, precision, efficiency)


def compiled(run: Run, chip: Chip, name: str) -> dict[str, Any]:
    """Figures of the step's program, compiled for a topology.

    Raises:
        Refused: if the compiler is missing, the mesh is not that of the machine, or the program is larger
            than what a TPU holds.
    """
    maker, extra = ("TPUs", "tpu") if chip.dimensions else ("GPUs", "cuda")
    if importlib.util.find_spec("libtpu" if chip.dimensions else "jax_cuda13_plugin") is None:
        raise Refused(
            f"The compiler for {maker} such as {name} is not installed: pip install '.[{extra}]', or add "
            "--analytic."
        )
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    try:
        devices = _tpus(name) if chip.dimensions else hopper.devices(chip, topology(name)[1])
        grid = mesh.make_mesh(run.mesh.pipeline, run.mesh.data, run.mesh.expert, devices)
    except ValueError as error:
        raise Refused(str(error)) from None
    try:
        result = aot.compile_step(run, grid, aot.OPTIONS[extra])
    except jax.errors.JaxRuntimeError as error:
        raise Refused(f"The step was not compiled for {name}: {error}") from None
    links = aot.links(grid, chip.fast_link, chip.dimensions) if chip.dimensions else hopper.links(grid, chip)
    rates = Rates(chip.bf16, chip.fp8, chip.memory_bandwidth, links)
    program = read(result.text, dict(grid.shape), rates, aot.turns(run), _filled(run))
    memory = {**result.memory, "fits": result.memory["peak_bytes"] <= chip.memory_bytes}
    return {
        "device": {"kind": chip.kind, "count": len(devices), "memory_bytes": chip.memory_bytes},
        "memory": memory,
        **_bounds(run, chip, program, len(devices)),
        "compile_seconds": result.seconds,
    }


def _tpus(name: str) -> list:
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def _filled(run: Run) -> float:
    """How much of the room between devices a balanced load takes, in which a token travels once to each."""
    devices, room = run.mesh.expert, run.dispatch.room
    rows = devices if room is None else min(devices, room * run.model.top_k)
    return min(1.0, visited(run.model, devices) / rows)


def _bounds(run: Run, chip: Chip, program: Program, devices: int) -> dict[str, Any]:
    """What a step takes at least, if products, memory and links ran at their peak and nothing else waited."""
    exposed = {kind: c.seconds - c.hidden for kind, c in program.collectives.items()}
    seconds = program.seconds + sum(exposed.values())
    tokens = run.train.batch_size * run.train.sequence_length
    useful = size.flops_per_token(run.model, run.train.sequence_length) * tokens
    return {
        "flops": program.flops,
        "collectives": {
            kind: {
                "count": c.count,
                "asynchronous": c.asynchronous,
                "bytes": c.bytes,
                "seconds": c.seconds,
                "exposed_seconds": exposed[kind],
                "hidden_share": c.hidden_share,
            }
            for kind, c in program.collectives.items()
        },
        "compute_seconds": program.seconds,
        "step_seconds_bound": seconds,
        "tokens_per_second_bound": tokens / seconds,
        "mfu_bound": useful / seconds / devices / chip.bf16,
        "device_hours_for_14.8T_tokens": TOKENS / tokens * seconds * devices / 3600,
        "costly": [line._asdict() for line in program.costly],
        "exposed": [line._asdict() for line in program.exposed],
        "not_counted": program.unknown,
    }


def _write(path: str, content: bytes) -> None:
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror}): choose another place.") from error


if __name__ == "__main__":
    settings.run(main, default="deepseek_v3")
