"""The one place where the program becomes local to a device: losses, gradients and scores of a global batch.

Outside, arrays are global and typed by the mesh; inside `on_each_device` they are what one device holds.
Micro-batches run one after another, or in the slots of a pipeline's schedule, and gradients add up in FP32 on
each device until all have run. Scores are computed by every rank of a pipeline alike: they are asked for
seldom.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model.loss import Scores, scores
from dsv3_jax.model.model import Losses, Model, losses, trunk
from dsv3_jax.ops import Ops
from dsv3_jax.ops.context import WHOLE
from dsv3_jax.pipeline import slots
from dsv3_jax.pipeline.objective import Batch, Objective, Weights, targets
from dsv3_jax.pipeline.placement import placement
from dsv3_jax.pipeline.schedule import Schedule


class Result(NamedTuple):
    """Means over the global batch."""

    loss: Float[Array, ""]
    parts: Losses
    load: Int[Array, "L E"]
    grads: Model


def value_and_grad(
    model: Model,
    bias: Float[Array, "L E"],
    batch: Batch,
    weights: Weights,
    c: Config,
    ops: Ops,
    schedule: Callable[[int, int], Schedule],
) -> Result:
    """The loss of a global batch, its parts, expert load, and gradients laid out like the weights.

    Args:
        schedule: of ranks and micro-batches; asked where the pipeline axis has several ranks.
    """
    specs = mesh.specs(model)
    ranks, run = jax.sharding.get_abstract_mesh().shape[mesh.PIPELINE], one_by_one
    if ranks > 1:
        chosen = schedule(ranks, batch.tokens.shape[0])
        run = partial(slots.run, chosen, placement(chosen, c))

    def device(model, bias, batch, weights):
        model = mesh.vary(model)  # gradients stay per device until all micro-batches are done
        objective = Objective.of(batch.mine(ops.context, 1), weights)
        batch = batch.mine(ops.context, 1 + c.mtp_depth)
        (parts, load), grads = run(model, specs, bias, batch, objective, c, ops)
        parts, load = jax.tree.map(lambda x: jax.lax.psum(mesh.vary(x), mesh.AXES), (parts, load))
        return objective.total(parts), parts, load, mesh.reduce_gradients(grads, specs)

    return Result(*on_each_device(device, (P(), P(), P(), specs))(model, bias, batch, weights))


def one_by_one(
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    batch: Batch,
    objective: Objective,
    c: Config,
    ops: Ops,
) -> tuple[tuple[Losses, Int[Array, "L E"]], Model]:
    """A device's parts of loss, load and gradients: one micro-batch after another, all layers on each."""
    prepared, _ = ops.prepare(model, specs)

    def loss(model, tokens, segments):
        sums, load = losses(ops.attach(model, prepared), specs, bias, tokens, segments, c, ops)
        parts = objective.parts(sums)
        return objective.total(parts), (parts, load)

    def micro_batch(carry, batch):
        grads, counts = jax.grad(loss, has_aux=True)(model, *batch)
        return jax.tree.map(jnp.add, carry, (counts, grads)), None

    zero = jnp.zeros(())
    start = (Losses(zero, zero, zero), jnp.zeros_like(bias, jnp.int32)), jax.tree.map(jnp.zeros_like, model)
    total, _ = jax.lax.scan(micro_batch, mesh.vary(start), batch)
    return total


def score(model: Model, bias: Float[Array, "L E"], batch: Batch, c: Config, ops: Ops) -> Scores:
    """What is said of the token after each position, [M, B, S]; in another segment it means nothing."""
    specs = mesh.specs(model)

    def device(model, bias, batch):
        model, bias = _ready(model, specs, ops), mesh.vary(bias)
        head = ops.gather(model.head, specs.head)

        def micro_batch(_, batch):
            tokens, segments = batch
            hidden, _ = trunk(model, specs, bias, tokens[:, :-1], segments[:, :-1], c, ops)
            return None, scores(hidden, head, tokens[:, 1:])

        return _same_on_every_stage(jax.lax.scan(micro_batch, None, batch.mine(ops.context, 1))[1])

    layout = P(None, ops.context.sequences, ops.context.positions)
    return on_each_device(device, layout)(model, bias, batch)


def expert_load(
    model: Model, bias: Float[Array, "L E"], batch: Batch, c: Config, ops: Ops
) -> Int[Array, "R E"]:
    """How often positions with a target choose each expert of the R routed layers of the main model."""
    specs = mesh.specs(model)

    def device(model, bias, batch):
        model, bias = _ready(model, specs, ops), mesh.vary(bias)

        def micro_batch(load, batch):
            tokens, segments = batch.tokens[:, :-1], jnp.where(targets(batch), batch.segments[:, :-1], 0)
            _, balance = trunk(model, specs, bias, tokens, segments, c, ops)
            return load + balance.load, None

        start = mesh.vary(jnp.zeros((c.routed_layers, c.experts), jnp.int32))
        load, _ = jax.lax.scan(micro_batch, start, batch.mine(ops.context, 1))
        return _same_on_every_stage(jax.lax.psum(load, mesh.TOKENS))

    return on_each_device(device, P())(model, bias, batch)


def next_token_logits(
    model: Model,
    bias: Float[Array, "L E"],
    tokens: Int[Array, "B S"],
    last: Int[Array, " B"],
    c: Config,
    ops: Ops,
) -> Float[Array, "B W"]:
    """Logits of the token that follows position `last` of each sequence, FP32."""
    specs = mesh.specs(model)
    ops = replace(ops, context=WHOLE)

    def device(model, bias, tokens, last):
        model = _ready(model, specs, ops)
        head = ops.gather(model.head, specs.head)
        hidden, _ = trunk(model, specs, mesh.vary(bias), tokens, jnp.ones_like(tokens), c, ops)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return _same_on_every_stage(jnp.dot(final, head, preferred_element_type=jnp.float32))

    return on_each_device(device, P(mesh.TOKENS, None))(model, bias, tokens, last)


def on_each_device(program: Callable, out_specs) -> Callable:
    """The only `shard_map` of the library: every axis manual, layouts of inputs read from their types."""
    return jax.shard_map(program, out_specs=out_specs)


def _ready(model: Model, specs: Model, ops: Ops) -> Model:
    """Weights as forward passes read them."""
    model = mesh.vary(model)
    return ops.attach(model, ops.prepare(model, specs)[0])


def _same_on_every_stage(values: Any) -> Any:
    """Types values as equal over the pipeline axis, all ranks of which have computed them."""
    first = jax.lax.axis_index(mesh.PIPELINE) == 0
    own = jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros((), x.dtype)), values)
    return jax.lax.psum(own, mesh.PIPELINE)
