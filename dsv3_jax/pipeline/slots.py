"""Runs the slots of a pipeline's schedule: losses and gradients of all micro-batches, on each rank.

In a slot every rank does the work that its table names, layer by layer, in loops that turn as often as there
is work: a rank that has none waits at the end of the slot and computes nothing. A forward and a backward of
one slot share a loop, so that the exchange of tokens of each stands beside products of the other. At the end
of a slot neighbours exchange outputs and gradients.

What is kept of a forward until its backward, and of a backward until its gradients of weights, lies in pools
as large as the schedule's table says. Weights are no part of it: they lie whole on the rank, once.
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
from dsv3_jax.model.balance import Balance
from dsv3_jax.model.block import RoutedBlock
from dsv3_jax.model.model import Losses, Model, first, last
from dsv3_jax.ops import Ops
from dsv3_jax.pipeline.cut import Phase, cut
from dsv3_jax.pipeline.objective import Batch, Objective
from dsv3_jax.pipeline.placement import Placement, bring
from dsv3_jax.pipeline.schedule import Schedule
from dsv3_jax.pipeline.table import NONE, SENDERS, Pools, Row, Table, table


class Job(NamedTuple):
    """One kind of work in every slot of every rank, or what one rank does of it in one slot."""

    layers: Any  # turns of the loop over layers
    first: Any  # of these layers among those of the rank
    entry: Any  # 1 where the stage is the first, so that what comes before the routed layers is its too
    exit: Any  # 1 where it is the last
    microbatch: Any
    mail: Any  # where its input lies
    kept: Any
    waiting: Any


class Jobs(NamedTuple):
    """All that ranks do, and the place in the mail for what arrives, by its sender."""

    forward: Job
    backward: Job  # of inputs and weights
    inputs: Job  # a backward whose gradients of weights wait
    weights: Job
    outputs: Any
    gradients: Any


class Whole(NamedTuple):
    """What a device needs and does not change."""

    jobs: Jobs  # of all slots and ranks
    ends: Model  # all weights but those of routed layers
    layers: RoutedBlock  # of this rank, as products read them
    bias: Float[Array, "N E"]  # of these
    last_bias: Float[Array, "K E"]  # of MTP
    batch: Batch
    objective: Objective
    specs: Model  # of weights that are split no more
    c: Config
    ops: Ops
    phases: list[Phase]  # of a layer: forward, gradient of its input, gradient of its weights


class State(NamedTuple):
    """What slots change. All but the mail of idle ranks is exact."""

    x: Float[Array, "B S D"]  # between the layers of a forward
    g: Float[Array, "B S D"]  # between those of a backward
    mail: Float[Array, "places B S D"]  # the last place takes what is for nobody
    kept: list[Array]  # [places, layers, ...]
    waiting: list[Array]
    parts: Losses
    load: Int[Array, "N E"]
    last_load: Int[Array, "K E"]
    layer_grads: RoutedBlock
    end_grads: Model


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
        jobs=_jobs(plan, schedule, where),
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
    whole = whole._replace(phases=_phases(whole))
    start = _start(whole, pools, int(where.count.max()))
    end, _ = jax.lax.scan(partial(_slot, whole), start, whole.jobs)

    load = mesh.vary(jnp.zeros((c.routed_layers, c.experts), jnp.int32)).at[mine].add(end.load)
    _, share = jax.vjp(lambda w: bring(w, specs.routed, where.layers), model.routed)
    _, scatter = jax.vjp(
        lambda w: mesh.gather(w, specs.replace(routed=None)), model.replace(routed=None)
    )
    grads = scatter(end.end_grads)[0].replace(routed=share(end.layer_grads)[0])
    return (end.parts, jnp.concatenate([load, end.last_load])), grads


def _jobs(plan: Table, schedule: Schedule, where: Placement) -> Jobs:
    ranks = np.arange(schedule.ranks)

    def job(row: Row, chosen: np.ndarray) -> Job:
        count, first = where.count[ranks, row.chunk], where.first[ranks, row.chunk]
        entry, exit = row.stage == 0, row.stage == schedule.stages - 1
        numbers = (np.where(chosen, n, 0).astype(np.int32) for n in (count, first, entry, exit))
        return Job(*numbers, row.microbatch, row.mail, row.kept, row.waiting)

    backward, waits = plan.backward, plan.backward.waiting != NONE
    return Jobs(
        job(plan.forward, plan.forward.stage != NONE),
        job(backward, (backward.stage != NONE) & ~waits),
        job(backward, waits),
        job(plan.weight, plan.weight.stage != NONE),
        plan.outputs,
        plan.gradients,
    )


def _start(whole: Whole, pools: Pools, most: int) -> State:
    sequences, positions = whole.batch.tokens.shape[1:]
    x = jnp.zeros((sequences, positions - 1, whole.c.d_model), whole.ops.dtype)
    zero = jnp.zeros(())

    def pool(places: int, phase: Phase) -> list[Array]:
        return [jnp.zeros((places, most, *a.shape), a.dtype) for a in phase.hands_on]

    def grads(prepared):
        return jax.tree.map(
            lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)),
            whole.ops.stand_in(prepared),
        )

    forward, inputs, _ = whole.phases
    start = State(
        x=x,
        g=x,
        mail=jnp.zeros((pools.mail + 1, *x.shape), x.dtype),
        kept=pool(pools.kept, forward),
        waiting=pool(pools.waiting, inputs),
        parts=Losses(zero, zero, zero),
        load=jnp.zeros_like(whole.bias, jnp.int32),
        last_load=jnp.zeros_like(whole.last_bias, jnp.int32),
        layer_grads=grads(whole.layers),
        end_grads=grads(whole.ends),
    )
    return mesh.vary(start)


def _phases(whole: Whole) -> list[Phase]:
    """A routed layer's training, cut."""
    ops = whole.ops

    def program(lasting, x, g, _):
        prepared, bias, segments = lasting

        def layer(weights, x):
            return ops.attach(weights, prepared)(x, bias, segments, whole.c, ops)

        (y, balance), pull = jax.vjp(ops.remat(layer), ops.stand_in(prepared), *x)
        uncounted: Any = np.zeros(balance.load.shape, jax.dtypes.float0)
        dy, balance_weight = g
        dw, dx = pull((dy, Balance(uncounted, balance_weight)))
        return (y, balance), dx, dw

    x = mesh.vary(jnp.zeros((*whole.batch.tokens[0, :, 1:].shape, whole.c.d_model), ops.dtype))
    return cut(program, _lasting(whole, 0, 0), (x,), (x, _balance_weight(whole)), ())


def _lasting(whole: Whole, layer, microbatch):
    """What all phases of a layer read of weights and batch."""
    weights = jax.tree.map(lambda w: w[layer], whole.layers)
    return weights, whole.bias[layer], whole.batch.segments[microbatch, :, :-1]


def _balance_weight(whole: Whole) -> Float[Array, ""]:
    """The gradient of the balance loss of each layer."""
    return mesh.vary(whole.objective.weights.balance * whole.objective.per_sequence)


def _slot(whole: Whole, state: State, row: Jobs) -> tuple[State, None]:
    """One slot of this rank, and the exchange at its end."""
    rank = jax.lax.axis_index(PIPELINE)
    now: Jobs = mesh.vary(jax.tree.map(lambda numbers: numbers[rank], row))
    every = whole.jobs
    f, b, i, w = now.forward, now.backward, now.inputs, now.weights
    state = state._replace(x=state.mail[f.mail], g=state.mail[jnp.maximum(b.mail, i.mail)])
    state = _loop(0, f.entry, lambda _, s: _enter(whole, f, s), state)
    state = _loop(0, b.exit + i.exit, lambda _, s: _exit(whole, b, s), state)

    both = jnp.int32(0)
    if np.any((every.forward.layers > 0) & (every.backward.layers > 0)):
        both = jnp.minimum(f.layers, b.layers)
        state = _loop(0, both, lambda n, s: _pair(whole, f, b, n, s), state)
    state = _loop(both, f.layers, lambda n, s: _forward(whole, f, n, s), state)
    if np.any(every.backward.layers):
        state = _loop(both, b.layers, lambda n, s: _backward(whole, b, n, s), state)
    if np.any(every.weights.layers):
        state = _loop(0, i.layers, lambda n, s: _inputs(whole, i, n, s), state)
        state = _loop(0, w.layers, lambda n, s: _weights(whole, w, n, s), state)

    state = _loop(0, b.entry + i.entry, lambda _, s: _enter_backward(whole, b, s), state)
    mail = _exchange(state.mail, state.x, every.outputs, now.outputs)
    return state._replace(mail=_exchange(mail, state.g, every.gradients, now.gradients)), None


def _loop(start, end, body: Callable, state: State) -> State:
    """Turns as often as this rank wants; a loop of one turn is a condition."""
    return jax.lax.fori_loop(start, end, body, state)


def _enter(whole: Whole, job: Job, state: State) -> State:
    """The first stage's input, from tokens."""
    return state._replace(x=_embedded(whole, job, whole.ops.stand_in(whole.ends)))


def _enter_backward(whole: Whole, job: Job, state: State) -> State:
    """Gradients of what comes before the routed layers, which is computed again: nothing of it is kept."""
    _, pull = jax.vjp(partial(_embedded, whole, job), whole.ops.stand_in(whole.ends))
    return state._replace(end_grads=_add(state.end_grads, pull(state.g)[0]))


def _embedded(whole: Whole, job: Job, weights: Model) -> Float[Array, "B S D"]:
    tokens, segments = (x[job.microbatch, :, :-1] for x in whole.batch)
    model = whole.ops.attach(weights, whole.ends)
    return first(model, whole.specs, tokens, segments, whole.c, whole.ops)


def _exit(whole: Whole, job: Job, state: State) -> State:
    """The losses, and their gradients, from the output of the last stage's layers."""
    tokens, segments = (x[job.microbatch] for x in whole.batch)

    def loss(weights, x):
        model = whole.ops.attach(weights, whole.ends)
        sums, load = last(
            model, whole.specs, whole.last_bias, x, tokens, segments, whole.c, whole.ops
        )
        parts = whole.objective.parts(sums)
        return whole.objective.total(parts), (parts, load)

    weights = whole.ops.stand_in(whole.ends)
    (dw, g), (parts, load) = jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, state.g)
    return state._replace(
        g=g,
        parts=jax.tree.map(jnp.add, state.parts, parts),
        last_load=state.last_load + load,
        end_grads=_add(state.end_grads, dw),
    )


def _forward(whole: Whole, job: Job, turn, state: State) -> State:
    """The next layer forward."""
    layer = job.first + turn
    (x, balance), kept = whole.phases[0].run(_lasting(whole, layer, job.microbatch), [], state.x)
    loss = state.parts.balance + balance.loss * whole.objective.per_sequence
    return state._replace(
        x=x,
        kept=_put(state.kept, (job.kept, turn), kept),
        parts=state.parts._replace(balance=loss),
        load=state.load.at[layer].add(balance.load),
    )


def _backward(whole: Whole, job: Job, turn, state: State) -> State:
    """The layer before backward, its weights included."""
    return _with_gradients(whole, job, turn, state, _get(state.kept, (job.kept, job.layers - 1 - turn)))


def _pair(whole: Whole, f: Job, b: Job, turn, state: State) -> State:
    """A layer forward and another backward; neither reads what the other makes."""
    kept = _get(state.kept, (b.kept, b.layers - 1 - turn))
    return _with_gradients(whole, b, turn, _forward(whole, f, turn, state), kept)


def _with_gradients(whole: Whole, job: Job, turn, state: State, kept: list[Array]) -> State:
    layer = job.first + job.layers - 1 - turn
    lasting = _lasting(whole, layer, job.microbatch)
    g, waiting = whole.phases[1].run(lasting, kept, state.g, _balance_weight(whole))
    dw, _ = whole.phases[2].run(lasting, waiting)
    return state._replace(g=g, layer_grads=_add_at(state.layer_grads, layer, dw))


def _inputs(whole: Whole, job: Job, turn, state: State) -> State:
    """The layer before backward; what its weights' gradients need waits."""
    turn = job.layers - 1 - turn
    lasting = _lasting(whole, job.first + turn, job.microbatch)
    kept = _get(state.kept, (job.kept, turn))
    g, waiting = whole.phases[1].run(lasting, kept, state.g, _balance_weight(whole))
    return state._replace(g=g, waiting=_put(state.waiting, (job.waiting, turn), waiting))


def _weights(whole: Whole, job: Job, turn, state: State) -> State:
    """The gradients of a layer's weights that have waited."""
    layer = job.first + turn
    lasting = _lasting(whole, layer, job.microbatch)
    dw, _ = whole.phases[2].run(lasting, _get(state.waiting, (job.waiting, turn)))
    return state._replace(layer_grads=_add_at(state.layer_grads, layer, dw))


def _exchange(mail: Array, made: Array, every: tuple[np.ndarray, ...], places: tuple[Array, ...]) -> Array:
    """Sends to neighbours, where any rank ever does, and puts what arrives in the mail."""
    ranks, nowhere = jax.lax.axis_size(PIPELINE), mail.shape[0] - 1
    for sender, ever, place in zip(SENDERS, every, places, strict=True):
        if np.any(ever != NONE):
            ways = [(i + sender, i) for i in range(ranks) if 0 <= i + sender < ranks]
            arrived = jax.lax.ppermute(made, PIPELINE, ways) if sender else made
            mail = mail.at[jnp.where(place == NONE, nowhere, place)].set(arrived)
    return mail


def _put(pool: list[Array], place: tuple, values: list[Array]) -> list[Array]:
    return [buffer.at[place].set(value) for buffer, value in zip(pool, values, strict=True)]


def _get(pool: list[Array], place: tuple) -> list[Array]:
    return [buffer[place] for buffer in pool]


def _add(sums, values):
    return jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, values)


def _add_at(sums, layer, values):
    return jax.tree.map(lambda s, v: s.at[layer].add(v.astype(s.dtype)), sums, values)
