"""What a rank does in a slot, to one state: layers forward and backward, and both ends of the model.

What is kept of a forward until its backward, and of a backward until its gradients of weights, lies in pools
as large as the schedule's table says. Weights are no part of it: they lie whole on the rank, once.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model.balance import Balance
from dsv3_jax.model.block import RoutedBlock
from dsv3_jax.model.model import Losses, Model, ahead, first, last
from dsv3_jax.ops import Ops
from dsv3_jax.pipeline.cut import Phase, cut
from dsv3_jax.pipeline.objective import Batch, Objective
from dsv3_jax.pipeline.stops import Steps, finish
from dsv3_jax.pipeline.table import Pools
from dsv3_jax.pipeline.turns import begin, in_turns, turns


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


class Whole(NamedTuple):
    """What a device needs and does not change."""

    ends: Model  # all weights but those of routed layers
    layers: RoutedBlock  # of this rank, as products read them
    bias: Float[Array, "N E"]  # of these
    last_bias: Float[Array, "K E"]  # of MTP
    batch: Batch  # of this device, with K tokens more
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


def phases(whole: Whole) -> list[Phase]:
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

    x = mesh.vary(_between_layers(whole))
    return cut(program, _lasting(whole, 0, 0), (x,), (x, _balance_weight(whole)), ())


def start(whole: Whole, pools: Pools, most: int) -> State:
    """Before the first slot; `most` layers are the most of a stage."""
    x = _between_layers(whole)
    zero = jnp.zeros(())

    def pool(places: int, phase: Phase) -> list[Array]:
        return [jnp.zeros((places, most, *a.shape), a.dtype) for a in phase.hands_on]

    def grads(prepared):
        return jax.tree.map(
            lambda w: jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)),
            whole.ops.stand_in(prepared),
        )

    forward, inputs, _ = whole.phases
    fresh = State(
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
    return mesh.vary(fresh)


def _between_layers(whole: Whole) -> Float[Array, "B S D"]:
    """Zeros in the shape of what goes from layer to layer."""
    positions = ahead(whole.batch.tokens[0], 0, whole.c).shape
    return jnp.zeros((*positions, whole.c.d_model), whole.ops.dtype)


def _lasting(whole: Whole, layer, microbatch):
    """What all phases of a layer read of weights and batch."""
    weights = jax.tree.map(lambda w: w[layer], whole.layers)
    return weights, whole.bias[layer], ahead(whole.batch.segments[microbatch], 0, whole.c)


def _balance_weight(whole: Whole) -> Float[Array, ""]:
    """The gradient of the balance loss of each layer."""
    return mesh.vary(whole.objective.weights.balance * whole.objective.per_sequence)


def enter(whole: Whole, job: Job, state: State) -> State:
    """The first stage's input, from tokens."""
    return state._replace(x=_embedded(whole, job, whole.ops.stand_in(whole.ends)))


def enter_backward(whole: Whole, job: Job, state: State) -> State:
    """Gradients of what comes before the routed layers, which is computed again: nothing of it is kept."""
    _, pull = jax.vjp(partial(_embedded, whole, job), whole.ops.stand_in(whole.ends))
    return state._replace(end_grads=_add(state.end_grads, pull(state.g)[0]))


def _embedded(whole: Whole, job: Job, weights: Model) -> Float[Array, "B S D"]:
    tokens, segments = (ahead(x[job.microbatch], 0, whole.c) for x in whole.batch)
    model = whole.ops.attach(weights, whole.ends)
    return first(model, whole.specs, tokens, segments, whole.c, whole.ops)


def exit(whole: Whole, job: Job, state: State) -> State:
    """The losses, and their gradients, from the output of the last stage's layers."""
    tokens, segments = (x[job.microbatch] for x in whole.batch)

    def loss(weights, x):
        model = whole.ops.attach(weights, whole.ends)
        sums, load = last(model, whole.specs, whole.last_bias, x, tokens, segments, whole.c, whole.ops)
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


def forward(whole: Whole, job: Job, turn, state: State) -> State:
    """The next layer forward."""
    return _moved_on(whole, job, turn, state, finish(_forward(whole, job, turn, state)))


def backward(whole: Whole, job: Job, turn, state: State) -> State:
    """The layer before backward, its weights included."""
    kept = _get(state.kept, (job.kept, job.layers - 1 - turn))
    return _with_gradients(job, turn, state, finish(_gradients(whole, job, turn, state, kept)))


def pair(whole: Whole, f: Job, b: Job, turn, state: State) -> State:
    """A layer forward and another backward, whose exchanges of tokens take turns."""
    # Read before what is kept of the forward is written, or XLA copies the pools.
    kept = _get(state.kept, (b.kept, b.layers - 1 - turn))
    kept, pools = jax.lax.optimization_barrier((kept, state.kept))
    order = turns(*(phase.stops for phase in whole.phases[:2])) + [1] * whole.phases[2].stops
    forward, gradients = in_turns(
        order, _forward(whole, f, turn, state), _gradients(whole, b, turn, state, kept)
    )
    state = _moved_on(whole, f, turn, state._replace(kept=pools), forward)
    return _with_gradients(b, turn, state, gradients)


def _forward(whole: Whole, job: Job, turn, state: State) -> Steps:
    lasting = _lasting(whole, job.first + turn, job.microbatch)
    (x,) = yield from begin(state.x)
    return (yield from whole.phases[0].steps(lasting, [], x))


def _moved_on(whole: Whole, job: Job, turn, state: State, done: tuple) -> State:
    (x, balance), kept = done
    loss = state.parts.balance + balance.loss * whole.objective.per_sequence
    return state._replace(
        x=x,
        kept=_put(state.kept, (job.kept, turn), kept),
        parts=state.parts._replace(balance=loss),
        load=state.load.at[job.first + turn].add(balance.load),
    )


def _gradients(whole: Whole, job: Job, turn, state: State, kept: list[Array]) -> Steps:
    lasting = _lasting(whole, job.first + job.layers - 1 - turn, job.microbatch)
    g, *kept = yield from begin(state.g, *kept)
    g, waiting = yield from whole.phases[1].steps(lasting, kept, g, _balance_weight(whole))
    dw, _ = yield from whole.phases[2].steps(lasting, waiting)
    return g, dw


def _with_gradients(job: Job, turn, state: State, done: tuple) -> State:
    g, dw = done
    grads = _add_at(state.layer_grads, job.first + job.layers - 1 - turn, dw)
    return state._replace(g=g, layer_grads=grads)


def inputs(whole: Whole, job: Job, turn, state: State) -> State:
    """The layer before backward; what its weights' gradients need waits."""
    turn = job.layers - 1 - turn
    lasting = _lasting(whole, job.first + turn, job.microbatch)
    kept = _get(state.kept, (job.kept, turn))
    g, waiting = whole.phases[1].run(lasting, kept, state.g, _balance_weight(whole))
    return state._replace(g=g, waiting=_put(state.waiting, (job.waiting, turn), waiting))


def weights(whole: Whole, job: Job, turn, state: State) -> State:
    """The gradients of a layer's weights that have waited."""
    layer = job.first + turn
    lasting = _lasting(whole, layer, job.microbatch)
    dw, _ = whole.phases[2].run(lasting, _get(state.waiting, (job.waiting, turn)))
    return state._replace(layer_grads=_add_at(state.layer_grads, layer, dw))


def _put(pool: list[Array], place: tuple, values: list[Array]) -> list[Array]:
    return [buffer.at[place].set(value) for buffer, value in zip(pool, values, strict=True)]


def _get(pool: list[Array], place: tuple) -> list[Array]:
    return [buffer[place] for buffer in pool]


def _add(sums, values):
    return jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, values)


def _add_at(sums, layer, values):
    return jax.tree.map(lambda s, v: s.at[layer].add(v.astype(s.dtype)), sums, values)
