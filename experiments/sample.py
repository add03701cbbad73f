"""A short continuation by plain sampling: the whole sequence is run again for every token."""

import functools

import jax
import numpy as np
from jax import P
from jaxtyping import Int

from dsv3_jax import mesh
from dsv3_jax.pipeline import execute
from dsv3_jax.training.step import Setup, State

_next = jax.jit(execute.next_token_logits, static_argnames=("c", "ops"))


def continuation(
    state: State,
    prompt: Int[np.ndarray, " prompt"],
    count: int,
    setup: Setup,
    devices: int,
    temperature: float = 0.7,
    seed: int = 0,
) -> Int[np.ndarray, " count"]:
    """Tokens sampled after a prompt; every device of the mesh is given the same sequence."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros(len(prompt) + count, np.int32)
    tokens[: len(prompt)] = prompt
    place = functools.partial(_replicate, devices=devices)
    for end in range(len(prompt), len(tokens)):
        logits = _next(
            state.model, state.bias, place(tokens), place(np.int32(end - 1)), c=setup.c, ops=setup.ops
        )
        scaled = np.asarray(logits.addressable_shards[0].data, np.float64)[0] / temperature
        odds = np.exp(scaled - scaled.max())
        tokens[end] = rng.choice(len(odds), p=odds / odds.sum())
    return tokens[len(prompt) :]


def _replicate(one: np.ndarray | np.integer, devices: int) -> jax.Array:
    """One copy for each device that tokens are split over."""
    everything = np.broadcast_to(one, (devices, *np.shape(one)))
    layout = jax.sharding.NamedSharding(jax.sharding.get_mesh(), P(mesh.TOKENS, *[None] * np.ndim(one)))
    return jax.make_array_from_callback(everything.shape, layout, lambda index: everything[index])
