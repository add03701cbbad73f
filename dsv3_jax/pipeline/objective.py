"""What a step works on and what it minimises."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import mesh
from dsv3_jax.model.model import Losses
from dsv3_jax.ops.context import WHOLE, Context


class Batch(NamedTuple):
    """M micro-batches of B sequences; one token more than positions, so that every position has a target.

    Segments number the documents of a row from 1; attention and targets stay inside one, and 0 is padding.
    """

    tokens: Int[Array, "M B S+1"]
    segments: Int[Array, "M B S+1"]

    def mine(self, context: Context, more: int) -> "Batch":
        """The tokens at a device's positions and some more after them, in segment -1 past the end."""
        return Batch(context.mine(self.tokens, more, 0), context.mine(self.segments, more, -1))


def targets(batch: Batch) -> Bool[Array, "M B S"]:
    """Which positions have a token to predict: one of the same segment, which is not padding."""
    here, after = batch.segments[..., :-1], batch.segments[..., 1:]
    return (here > 0) & (here == after)


def batch_spec(context: Context = WHOLE) -> P:
    """Sequences are split as the context says; each micro-batch is on all devices.

    Of sequences in parts a device is given all tokens, which are few bytes, and takes its own.
    """
    return P(None, context.sequences, None)


class Weights(NamedTuple):
    """What the further losses count for, beside 1 for the main one."""

    mtp: Float[Array, ""]  # lambda
    balance: Float[Array, ""]  # alpha


class Objective(NamedTuple):
    """From sums over the sequences of a device to its share of a global mean.

    Main and MTP losses are nats per target of the main model (the report divides MTP's by T too); the balance
    loss is a mean over sequences.
    """

    per_target: Float[Array, ""]
    per_sequence: float
    weights: Weights

    @classmethod
    def of(cls, batch: Batch, weights: Weights) -> "Objective":
        """That of a global batch; called by each device with its own part.

        Where devices share a sequence each of them counts it, here and in the sums of balance losses.
        """
        count = jax.lax.psum(jnp.sum(targets(batch)), mesh.TOKENS)
        devices = jax.lax.axis_size(mesh.DATA) * jax.lax.axis_size(mesh.EXPERT)
        sequences = batch.tokens.shape[0] * batch.tokens.shape[1] * devices
        return cls(1.0 / jnp.maximum(count, 1), 1.0 / sequences, weights)

    def parts(self, sums: Losses) -> Losses:
        """Shares of means."""
        return Losses(
            sums.main * self.per_target, sums.mtp * self.per_target, sums.balance * self.per_sequence
        )

    def total(self, parts: Losses) -> Float[Array, ""]:
        """What is minimised."""
        return parts.main + self.weights.mtp * parts.mtp + self.weights.balance * parts.balance
