"""Runs the slots of a pipeline's schedule: losses and gradients of all micro-batches, on each rank.

In a slot every rank does the work that its table names, layer by layer, in loops that turn as often as there
is work: a rank that has none waits at the end of the slot and computes nothing. A forward and a backward of
one slot share a loop, so that the exchange of tokens of each stands beside products of the other. At the end
of a slot neighbours exchange outputs and gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.mesh import PIPELINE
from dsv3_jax.model.model import Losses, Model
from dsv3_jax.ops import Ops
from dsv3_jax.pipeline import stage
from dsv3_jax.pipeline.objective import Batch, Objective
from dsv3_jax.pipeline.placement import Placement, bring
from dsv3_jax.pipeline.schedule import Schedule
from dsv3_jax.pipeline.stage import Job, State, Whole
from dsv3_jax.pipeline.table import NONE, SENDERS, Row, Table, table


class Jobs(NamedTuple):
    """All that ranks do, and the place in the mail for what arrives, by its sender."""

    forward: Job
    backward: Job  # of inputs and weights
    inputs: Job  # a backward whose gradients of weights wait
    weights: Job
    outputs: Any
    gradients: Any


def run(
    schedule: Schedule,
    where: Placement,
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    batch: Batch,
    objective: Objective,
    c: Config,
    ops: Ops,
) -> tuple[tuple[Losses, Int[Array, "L E"]], Model]:
    """A device's parts of loss, load and gradients, these sharded as the weights are."""
    plan, pools = table(schedule)
    prepared, prepared_specs = ops.prepare(model, specs)
    mine = jnp.asarray(where.layers)[jax.lax.axis_index(PIPELINE)]
    layers = bring(prepared.routed, prepared_specs.routed, where.layers)
    whole = Whole(
        ends=mesh.gather(prepared.replace(routed=None), prepared_specs.replace(routed=None)),
        layers=layers,
        bias=mesh.vary(bias[mine]),
        last_bias=mesh.vary(bias[c.routed_layers :]),
        batch=mesh.vary(batch),
        objective=mesh.vary(objective),
        specs=jax.tree.map(lambda _: P(), specs),
        c=c,
        ops=ops,
        phases=[],
    )
    whole = whole._replace(phases=stage.phases(whole))
    start, work = stage.start(whole, pools, int(where.counts.max())), jobs(plan, schedule, where)
    end, _ = jax.lax.scan(partial(_slot, whole, work), start, work)

    load = mesh.vary(jnp.zeros((c.routed_layers, c.experts), jnp.int32)).at[mine].add(end.load)
    _, share = jax.vjp(lambda w: bring(w, specs.routed, where.layers), model.routed)
    _, scatter = jax.vjp(lambda w: mesh.gather(w, specs.replace(routed=None)), model.replace(routed=None))
    grads = scatter(end.end_grads)[0].replace(routed=share(end.layer_grads)[0])
    return (end.parts, jnp.concatenate([load, end.last_load])), grads


def jobs(plan: Table, schedule: Schedule, where: Placement) -> Jobs:
    """A table's work with what a rank has to know for it: layers, and whether the stage is at an end."""
    ranks = np.arange(schedule.ranks)

    def job(row: Row, chosen: np.ndarray) -> Job:
        return Job(
            layers=np.where(chosen, where.counts[ranks, row.chunk], 0),
            first=where.starts[ranks, row.chunk],
            entry=(chosen & (row.stage == 0)).astype(np.int32),
            exit=(chosen & (row.stage == schedule.stages - 1)).astype(np.int32),
            microbatch=row.microbatch,
            mail=row.mail,
            kept=row.kept,
            waiting=row.waiting,
        )

    backward, waits = plan.backward, plan.backward.waiting != NONE
    return Jobs(
        job(plan.forward, plan.forward.stage != NONE),
        job(backward, (backward.stage != NONE) & ~waits),
        job(backward, waits),
        job(plan.weight, plan.weight.stage != NONE),
        plan.outputs,
        plan.gradients,
    )


def _slot(whole: Whole, every: Jobs, state: State, row: Jobs) -> tuple[State, None]:
    """One slot of this rank, and the exchange at its end. What no slot of any rank does is left out."""
    rank = jax.lax.axis_index(PIPELINE)
    now: Jobs = mesh.vary(jax.tree.map(lambda numbers: numbers[rank], row))
    f, b, i, w = now.forward, now.backward, now.inputs, now.weights  # b and i differ in their layers alone
    state = state._replace(x=state.mail[f.mail], g=state.mail[b.mail])
    state = _loop("enter", 0, f.entry, lambda _, s: stage.enter(whole, f, s), state)
    state = _loop("exit", 0, b.exit + i.exit, lambda _, s: stage.exit(whole, b, s), state)

    both = jnp.int32(0)
    if np.any((every.forward.layers > 0) & (every.backward.layers > 0)):
        both = jnp.minimum(f.layers, b.layers)
        state = _loop("pair", 0, both, lambda n, s: stage.pair(whole, f, b, n, s), state)
    state = _loop("forward", both, f.layers, lambda n, s: stage.forward(whole, f, n, s), state)
    if np.any(every.backward.layers):
        state = _loop("backward", both, b.layers, lambda n, s: stage.backward(whole, b, n, s), state)
    if np.any(every.weights.layers):
        state = _loop("inputs", 0, i.layers, lambda n, s: stage.inputs(whole, i, n, s), state)
        state = _loop("weights", 0, w.layers, lambda n, s: stage.weights(whole, w, n, s), state)

    state = _loop(
        "enter_backward", 0, b.entry + i.entry, lambda _, s: stage.enter_backward(whole, b, s), state
    )
    mail = _exchange(state.mail, state.x, every.outputs, now.outputs)
    return state._replace(mail=_exchange(mail, state.g, every.gradients, now.gradients)), None


def _loop(name: str, start, end, body: Callable, state: State) -> State:
    """Turns as often as this rank wants; a loop of one turn is a condition. Profiles show the name."""
    with jax.named_scope(name):
        return jax.lax.fori_loop(start, end, body, state)


def _exchange(mail: Array, made: Array, every: tuple[np.ndarray, ...], places: tuple[Array, ...]) -> Array:
    """Sends to neighbours, where any rank ever does, and puts what arrives in the mail."""
    ranks, nowhere = jax.lax.axis_size(PIPELINE), mail.shape[0] - 1
    for sender, ever, place in zip(SENDERS, every, places, strict=True):
        if np.any(ever != NONE):
            ways = [(i + sender, i) for i in range(ranks) if 0 <= i + sender < ranks]
            arrived = jax.lax.ppermute(made, PIPELINE, ways) if sender else made
            mail = mail.at[jnp.where(place == NONE, nowhere, place)].set(arrived)
    return mail
