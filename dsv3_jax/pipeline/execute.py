"""The one place where the program becomes local to a device: losses, gradients and scores of a global batch.

Outside, arrays are global and typed by the mesh; inside `_on_each_device` they are what one device holds.
Micro-batches run one after another and gradients add up in FP32 on each device until all have run.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model.loss import log_probabilities
from dsv3_jax.model.model import Losses, Model, losses, trunk
from dsv3_jax.ops import Ops


class Batch(NamedTuple):
    """M micro-batches of B sequences; one token more than positions, so that every position has a target.

    Segments number the documents of a row from 1; attention and targets stay inside one, and 0 is padding.
    """

    tokens: Int[Array, "M B S+1"]
    segments: Int[Array, "M B S+1"]


class Weights(NamedTuple):
    """What the further losses count for, beside 1 for the main one."""

    mtp: Float[Array, ""]  # lambda
    balance: Float[Array, ""]  # alpha


class Result(NamedTuple):
    """Means over the global batch."""

    loss: Float[Array, ""]
    parts: Losses
    load: Int[Array, "L E"]
    grads: Model


def targets(batch: Batch) -> Bool[Array, "M B S"]:
    """Which positions have a token to predict: one of the same segment, which is not padding."""
    here, after = batch.segments[..., :-1], batch.segments[..., 1:]
    return (here > 0) & (here == after)


def batch_spec() -> P:
    """Sequences are split over data and expert; a micro-batch is on all devices."""
    return P(None, mesh.TOKENS, None)


def value_and_grad(
    model: Model, bias: Float[Array, "L E"], batch: Batch, weights: Weights, c: Config, ops: Ops
) -> Result:
    """The loss of a global batch, its parts, expert load, and gradients laid out like the weights.

    Main and MTP losses are nats per target of the main model (the report divides MTP's by T too); the balance
    loss is a mean over sequences.
    """
    specs = mesh.specs(model)

    def device(model, bias, batch, weights):
        model = mesh.vary(model)  # gradients stay per device until all micro-batches are done
        count = jax.lax.psum(jnp.sum(targets(batch)), mesh.TOKENS)
        sequences = batch.tokens.shape[0] * batch.tokens.shape[1] * _token_devices()
        per_target, per_sequence = 1.0 / jnp.maximum(count, 1), 1.0 / sequences

        prepared = ops.prepare(model, specs)

        def loss(model, tokens, segments):
            sums, load = losses(prepared(model), specs, bias, tokens, segments, c, ops)
            parts = Losses(sums.main * per_target, sums.mtp * per_target, sums.balance * per_sequence)
            return parts.main + weights.mtp * parts.mtp + weights.balance * parts.balance, (parts, load)

        def micro_batch(carry, batch):
            (value, (parts, load)), grads = jax.value_and_grad(loss, has_aux=True)(model, *batch)
            return jax.tree.map(jnp.add, carry, Result(value, parts, load, grads)), None

        zero = jnp.zeros(())
        start = Result(
            zero,
            Losses(zero, zero, zero),
            jnp.zeros_like(bias, jnp.int32),
            jax.tree.map(jnp.zeros_like, model),
        )
        total, _ = jax.lax.scan(micro_batch, mesh.vary(start), batch)
        *sums, grads = total
        return *jax.tree.map(_sum_over_devices, sums), mesh.reduce_gradients(grads, specs)

    return Result(*_on_each_device(device, (P(), P(), P(), specs))(model, bias, batch, weights))


def score(
    model: Model, bias: Float[Array, "L E"], batch: Batch, c: Config, ops: Ops
) -> Float[Array, "M B S"]:
    """log p of the token after each position, FP32; where it is in another segment it means nothing."""
    specs = mesh.specs(model)

    def device(model, bias, batch):
        model = mesh.vary(model)
        model = ops.prepare(model, specs)(model)
        head = ops.gather(model.head, specs.head)

        def micro_batch(_, batch):
            tokens, segments = batch
            hidden, _ = trunk(model, specs, mesh.vary(bias), tokens[:, :-1], segments[:, :-1], c, ops)
            return None, log_probabilities(hidden, head, tokens[:, 1:])

        return _same_on_every_stage(jax.lax.scan(micro_batch, None, batch)[1])

    return _on_each_device(device, batch_spec())(model, bias, batch)


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

    def device(model, bias, tokens, last):
        model = mesh.vary(model)
        model = ops.prepare(model, specs)(model)
        head = ops.gather(model.head, specs.head)
        hidden, _ = trunk(model, specs, mesh.vary(bias), tokens, jnp.ones_like(tokens), c, ops)
        final = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return _same_on_every_stage(jnp.dot(final, head, preferred_element_type=jnp.float32))

    return _on_each_device(device, P(mesh.TOKENS, None))(model, bias, tokens, last)


def _on_each_device(program: Callable, out_specs) -> Callable:
    """The only `shard_map` of the library: every axis manual, layouts of inputs read from their types."""
    return jax.shard_map(program, out_specs=out_specs)


def _token_devices() -> int:
    return jax.lax.axis_size(mesh.DATA) * jax.lax.axis_size(mesh.EXPERT)


def _sum_over_devices(x: Array) -> Array:
    """Sums what each device counted of its own sequences."""
    return _same_on_every_stage(jax.lax.psum(x, mesh.TOKENS))


def _same_on_every_stage(x: Array) -> Array:
    """Types a value as equal over the pipeline axis, which has one stage."""
    return jax.lax.psum(x, mesh.PIPELINE)
