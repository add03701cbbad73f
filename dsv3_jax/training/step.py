"""The training step: gradients inside the flat region, everything else on global arrays."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import P
from jaxtyping import Array, Float, Int, UInt

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model import balance
from dsv3_jax.model.model import Model
from dsv3_jax.ops import Ops
from dsv3_jax.pipeline import execute
from dsv3_jax.pipeline.catalogue import one_f_one_b
from dsv3_jax.pipeline.objective import Batch, Weights, targets
from dsv3_jax.pipeline.schedule import Schedule
from dsv3_jax.training import optim, recipe
from dsv3_jax.training.recipe import Recipe


class Setup(NamedTuple):
    """What a run never changes, as one static argument: sizes, operations, recipe, type of the moments."""

    c: Config
    ops: Ops
    recipe: Recipe
    moments: jnp.dtype
    schedule: Callable[[int, int], Schedule] = one_f_one_b  # of the pipeline's ranks and micro-batches


class State(struct.PyTreeNode):
    """Everything a run needs to go on, but its place in the data."""

    model: Model
    bias: Float[Array, "L E"]  # of the routed layers, then of MTP's; moved by load, not by gradients
    optimizer: Any  # optax's state
    average: Model | None  # of parameters over steps, where the recipe asks for one
    step: Int[Array, ""]  # batches seen, skipped ones among them
    sequences: UInt[Array, ""]  # seen so far; tokens would pass 32 bits
    skipped: Int[Array, ""]  # batches whose loss or gradient was not finite
    skipped_in_a_row: Int[Array, ""]

    @classmethod
    def init(cls, key: Array, setup: Setup) -> "State":
        """A fresh state; call it under `jax.jit` with the mesh set."""
        c = setup.c
        bias = jnp.zeros((c.balanced_layers, c.experts), jnp.float32, out_sharding=P())
        return cls.around(Model.init(key, c, setup.recipe.init_std), bias, setup)

    @classmethod
    def around(cls, model: Model, bias: Float[Array, "L E"], setup: Setup) -> "State":
        """A state at step 0 for given weights."""
        optimizer = optim.init(model, setup.recipe, setup.moments)
        average = jax.tree.map(jnp.copy, model) if setup.recipe.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return cls(model, bias, optimizer, average, zero, jnp.zeros((), jnp.uint32), zero, zero)


class Metrics(NamedTuple):
    """What a step reports, FP32 but for counts; `load` is kept whole for the heat map."""

    loss: Float[Array, ""]
    main_loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    max_vio: Float[Array, ""]  # mean over layers
    max_vio_worst: Float[Array, ""]  # largest over layers
    load_entropy: Float[Array, ""]  # mean over layers
    sequences: UInt[Array, ""]  # seen so far, this batch included
    skipped_steps: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]
    load: Int[Array, "L E"]


@functools.partial(jax.jit, static_argnames="setup", donate_argnames="state")
def step(state: State, batch: Batch, *, setup: Setup) -> tuple[State, Metrics]:
    """One update. If loss or gradient is not finite, weights, moments, bias and average stay as they were."""
    r = setup.recipe
    tokens = state.sequences.astype(jnp.float32) * (batch.tokens.shape[-1] - 1)
    weights = Weights(recipe.mtp_weight(r, tokens), jnp.float32(r.balance_weight))
    rate = recipe.learning_rate(r, state.step, tokens)
    result = execute.value_and_grad(
        state.model, state.bias, batch, weights, setup.c, setup.ops, setup.schedule
    )
    norm = optax.tree.norm(result.grads)
    finite = jnp.isfinite(result.loss) & jnp.isfinite(norm)

    direction, optimizer = optim.update(result.grads, norm, state.optimizer, state.model, r, setup.moments)
    model = jax.tree.map(lambda w, d: w - rate * d, state.model, direction)
    bias = balance.update_bias(state.bias, result.load, recipe.bias_speed(r, tokens))
    average = state.average and jax.tree.map(
        lambda a, w: a + (1 - r.ema_decay) * (w - a), state.average, model
    )
    learned = state.replace(model=model, bias=bias, optimizer=optimizer, average=average)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learned, state)

    skip = 1 - finite.astype(jnp.int32)
    new = kept.replace(
        step=state.step + 1,
        sequences=state.sequences + jnp.uint32(batch.tokens.shape[0] * batch.tokens.shape[1]),
        skipped=state.skipped + skip,
        skipped_in_a_row=skip * (state.skipped_in_a_row + 1),
    )
    return new, _metrics(result, norm, rate, new)


def _metrics(result: execute.Result, norm: Array, rate: Array, state: State) -> Metrics:
    violation = balance.max_violation(result.load)
    return Metrics(
        loss=result.loss,
        main_loss=result.parts.main,
        mtp_loss=result.parts.mtp,
        balance_loss=result.parts.balance,
        grad_norm=norm,
        learning_rate=rate,
        max_vio=jnp.mean(violation),
        max_vio_worst=jnp.max(violation),
        load_entropy=jnp.mean(balance.load_entropy(result.load)),
        sequences=state.sequences,
        skipped_steps=state.skipped,
        skipped_in_a_row=state.skipped_in_a_row,
        load=result.load,
    )


@functools.partial(jax.jit, static_argnames="setup")
def evaluate(
    model: Model, bias: Float[Array, "L E"], batch: Batch, *, setup: Setup
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The sum of -log p over the targets of a batch, in nats, and how many targets there are."""
    scores = execute.score(model, bias, batch, setup.c, setup.ops).logprobs
    valid = jax.reshard(targets(batch), mesh.spec(scores))
    return -jnp.sum(jnp.where(valid, scores, 0.0)), jnp.sum(valid, dtype=jnp.int32)
