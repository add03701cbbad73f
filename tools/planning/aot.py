"""Compiles the training step of a config for a machine that is absent, and says what its memory holds."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import NamedSharding

from dsv3_jax import mesh
from dsv3_jax.pipeline.objective import Batch, batch_spec
from dsv3_jax.pipeline.placement import placement
from dsv3_jax.pipeline.slots import Jobs, jobs
from dsv3_jax.pipeline.table import table
from dsv3_jax.training import step
from dsv3_jax.training.step import State
from experiments.run import Run
from tools.planning.program import Loop

# XLA's all-to-all waits for its end at once unless told otherwise, and so does all on GPUs.
OPTIONS: dict[str, dict[str, str | bool]] = {
    "tpu": {"xla_tpu_enable_async_all_to_all": "true"},
    "cuda": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


class Compiled(NamedTuple):
    """A step's program for one device of a mesh."""

    text: str
    memory: dict[str, Any]
    seconds: float  # that tracing and compiling took


def compile_step(run: Run, grid: jax.sharding.Mesh, options: dict[str, str | bool]) -> Compiled:
    """Traces and compiles the step of a run for the devices of a mesh, which need not be there.

    Raises:
        jax.errors.JaxRuntimeError: if the program does not fit the device's memory.
    """
    start = time.monotonic()
    key = jax.eval_shape(jax.random.key, 0)
    with jax.set_mesh(grid):
        state = jax.eval_shape(lambda key: State.init(key, run.setup), key)
        parts, length = run.pipeline.microbatches, run.train.sequence_length + 1
        layout = NamedSharding(grid, batch_spec(run.context))
        shape = (parts, run.train.batch_size // parts, length)
        rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout)
        traced = step.step.trace(state, Batch(rows, rows), setup=run.setup)
        compiled = traced.lower().compile(compiler_options=options)
    memory = _memory(compiled.memory_analysis(), state, _carried(traced.jaxpr.jaxpr), run, grid)
    return Compiled(compiled.as_text() or "", memory, time.monotonic() - start)


def _memory(analysis, state: State, carried: int, run: Run, grid: jax.sharding.Mesh) -> dict[str, Any]:
    """Bytes of a device. What the step holds beside its arguments is told apart by the shapes it carries."""
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    # Results take the place of the donated state.
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    parameters, optimizer = _local(state.model), _local(state.optimizer)
    gradients = min(carried, _whole(state.model, run, grid))
    return {
        "arguments_bytes": arguments,
        "temporaries_bytes": temporaries,
        "peak_bytes": arguments + temporaries + fresh,
        "host_bytes": analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes,
        "by_kind": {
            "parameters": parameters,
            "optimizer": optimizer,
            "other_state": arguments - parameters - optimizer,
            "gradients": gradients,
            "activations": carried - gradients,
            "buffers_and_weights_in_use": temporaries - carried,
        },
    }


def _local(tree) -> int:
    """Bytes that one device holds of arrays as they are laid out between steps; counters lie on all."""

    def of(a: Any) -> int:
        shape = a.sharding.shard_shape(a.shape) if a.sharding is not None else a.shape
        return math.prod(shape) * np.dtype(a.dtype).itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def _whole(model, run: Run, grid: jax.sharding.Mesh) -> int:
    """Bytes of a rank's gradients in FP32 while micro-batches run: of its layers, and of both ends."""
    if run.mesh.pipeline == 1:
        return _local(model)
    schedule = run.setup.schedule(run.mesh.pipeline, run.pipeline.microbatches)
    share = placement(schedule, run.model).layers.shape[1] / run.model.routed_layers

    def held(tree) -> int:
        experts = [mesh.EXPERT in a.sharding.spec for a in jax.tree.leaves(tree)]
        parts = [grid.shape[mesh.EXPERT] if split else 1 for split in experts]
        return sum(4 * a.size // n for a, n in zip(jax.tree.leaves(tree), parts, strict=True))

    return int(share * held(model.routed)) + held(model.replace(routed=None))


def _carried(jaxpr: core.Jaxpr) -> int:
    """Bytes that the largest loop of a program carries; that over slots, or micro-batches, makes no more."""
    return max((_bytes(equation) for equation in _scans(jaxpr)), default=0)


def _scans(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for value in equation.params.values():
            inner = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
            if isinstance(inner, core.Jaxpr):
                yield from _scans(inner)


def _bytes(equation: core.JaxprEqn) -> int:
    made: list[Any] = [v.aval for v in equation.outvars]
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in made)


def links(grid: jax.sharding.Mesh, bytes_a_second: float, dimensions: int) -> dict[str, float]:
    """Bytes a second that each TPU can send to all others along an axis of a mesh, all at the same time.

    Args:
        bytes_a_second: that a device sends over all links of its chip together.
        dimensions: of the torus, each of which has two of a chip's links. What is sent goes the shortest way,
            one dimension after another, and the busiest link decides. Sides of fewer than four chips are
            no rings.
    """
    places = np.array([d.coords for d in grid.devices.flat])
    torus, devices = places.max(axis=0) + 1, len(places)
    link = bytes_a_second * devices / math.prod(torus) / (2 * dimensions)
    places = places.reshape(*grid.devices.shape, -1)
    rates = {}
    for number, axis in enumerate(grid.axis_names):
        groups = np.moveaxis(places, number, -2).reshape(-1, grid.shape[axis], places.shape[-1])
        rates[axis] = link / max(_busiest(groups, torus), 1 / (2 * dimensions))
    return rates


def _busiest(groups: np.ndarray, torus: np.ndarray) -> float:
    """What the busiest link carries, of what each device of each group [n, 3] sends to all of it."""
    members = groups.shape[1]
    pairs = np.broadcast_arrays(groups[:, :, None], groups[:, None])
    at, goal = (x.reshape(-1, len(torus)).copy() for x in pairs)
    most = 0.0
    for axis, side in enumerate(torus):
        ring = side % 4 == 0
        up = (goal - at)[:, axis] % side if ring else (goal - at)[:, axis]
        down = -up % side if ring else -up
        for way, hops, other in ((1, up, down), (-1, down, up)):
            share = np.where(hops == other, 0.5, hops < other) if ring else 1.0  # half of a tie each way
            carried = np.zeros(torus)
            for hop in range(max(0, hops.max())):
                here = at.copy()
                here[:, axis] = (here[:, axis] + way * hop) % side
                np.add.at(carried, tuple(here.T), share * (hop < hops))
            most = max(most, carried.max())
        at[:, axis] = goal[:, axis]
    return most / members


def turns(run: Run) -> Callable[[Loop], float]:
    """How often loops turn in a mean slot of the pipeline, on the rank that the others wait for there.

    Loads are taken as balanced, so that no tokens go in further rounds.
    """
    scopes = {"further_rounds": 0.0, "further_rows": 1.0}
    if run.mesh.pipeline > 1:
        schedule = run.setup.schedule(run.mesh.pipeline, run.pipeline.microbatches)
        scopes |= _in_a_slot(jobs(table(schedule)[0], schedule, placement(schedule, run.model)))

    def of(loop: Loop) -> float:
        named = [scope for scope in reversed(loop.op_name.split("/")) if scope in scopes]
        return scopes[named[0]] if named else 1.0

    return of


def _in_a_slot(work: Jobs) -> dict[str, float]:
    f, b, i, w = work.forward, work.backward, work.inputs, work.weights
    both = np.minimum(f.layers, b.layers)
    by_scope = {
        "enter": f.entry,
        "exit": b.exit + i.exit,
        "pair": both,
        "forward": f.layers - both,
        "backward": b.layers - both,
        "inputs": i.layers,
        "weights": w.layers,
        "enter_backward": b.entry + i.entry,
    }
    # A backward takes about two forwards, and each end some layers.
    slowest = np.argmax(f.layers + 2 * b.layers + i.layers + w.layers + 3 * by_scope["exit"], axis=1)
    rows = np.arange(len(slowest))
    return {scope: float(np.mean(counts[rows, slowest])) for scope, counts in by_scope.items()}
