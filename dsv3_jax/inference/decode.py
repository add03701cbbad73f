"""The two programs of generation, on slots that hold a sequence each: reading a prompt, and writing on.

A step runs the last token of each sequence and, where MTP drafts, its draft of the one after. The draft is
kept where it is the token that is sampled after the first, and then the step gives two (arXiv:2412.19437,
section 5.4.3). Sequences are split over all devices; nothing depends on what stands in other slots.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.inference.sampling import Sampling, sample
from dsv3_jax.model import cached
from dsv3_jax.model.cached import Attend, Cache, Rows, Served
from dsv3_jax.ops import Ops
from dsv3_jax.pipeline.execute import on_each_device

SLOTS = P(mesh.AXES)  # how everything that has a row a slot, or a prompt, is laid out


class Running(struct.PyTreeNode):
    """Sequences under way."""

    cache: Cache
    tokens: Int[Array, "B S"]  # the last one, which is not cached yet, and where MTP drafts, the next
    left: Int[Array, " B"]  # tokens that may still come; 0 where no sequence goes on
    sampling: Sampling
    ends: Int[Array, "B N"]  # ids that end a sequence; -1 for none

    @classmethod
    def init(cls, c: Config, ops: Ops, slots: int, most: int, drafts: int, ends: int) -> "Running":
        """Empty slots for sequences of `most` tokens; call it under `jax.jit` with the mesh set.

        Args:
            drafts: tokens that MTP adds to a step, 0 or 1.
        """
        zeros = lambda shape, dtype: jnp.zeros(shape, dtype, out_sharding=SLOTS)  # noqa: E731
        sampling = Sampling(
            zeros(slots, jnp.float32),
            zeros(slots, jnp.int32),
            zeros(slots, jnp.float32),
            zeros(slots, jnp.uint32),
        )
        cache = Cache.init(c, slots, most, c.layers + drafts, ops.dtype)
        tokens, left = zeros((slots, 1 + drafts), jnp.int32), zeros(slots, jnp.int32)
        return cls(cache, tokens, left, sampling, zeros((slots, ends), jnp.int32) - 1)


class Prompt(struct.PyTreeNode):
    """Parts of prompts, one a row, for slots of the same device."""

    rows: Rows
    tokens: Int[Array, "b S+1"]  # behind the real ones the prompt's next; -1 where it is to be sampled
    left: Int[Array, " b"]  # tokens that may come after the prompt
    sampling: Sampling
    ends: Int[Array, "b N"]


class Sampled(NamedTuple):
    """Tokens that a step gave, of which the first `counts` are real; all of it in the end on each device."""

    tokens: Int[Array, "*n B S"]
    logprobs: Float[Array, "*n B S"]
    counts: Int[Array, "*n B"]


@partial(jax.jit, static_argnames=("c", "ops", "attend"), donate_argnames="running")
def prefill(
    model: Served,
    running: Running,
    prompt: Prompt,
    *,
    c: Config,
    ops: Ops,
    attend: Callable[[Rows, Config, Ops], Attend],
) -> tuple[Running, Sampled]:
    """Reads parts of prompts into their slots, and samples after those that end.

    Args:
        attend: `cached.first_tokens` for prompts' first parts, `cached.further_tokens` for others.
    """

    def device(model, running, prompt):
        model, running, prompt = mesh.vary((model, running, prompt))
        return _read(model, running, prompt, attend, c, ops)

    outs = mesh.specs(running), SLOTS
    running, sampled = on_each_device(device, outs)(model, running, prompt)
    return running, jax.reshard(sampled, P())


@partial(jax.jit, static_argnames=("c", "ops", "steps"), donate_argnames="running")
def decode(model: Served, running: Running, *, c: Config, ops: Ops, steps: int) -> tuple[Running, Sampled]:
    """Goes on with all sequences for some steps; results have these in front."""

    def device(model, running):
        model, running = mesh.vary((model, running))
        step = lambda running, _: _step(model, running, c, ops)  # noqa: E731
        return jax.lax.scan(step, running, length=steps)

    outs = mesh.specs(running), P(None, mesh.AXES)
    running, sampled = on_each_device(device, outs)(model, running)
    return running, jax.reshard(sampled, P())


def _logits(model: Served, hidden: Float[Array, "b S D"]) -> Float[Array, "b S W"]:
    return jnp.dot(hidden, model.head, preferred_element_type=jnp.float32)


def _read(
    model: Served,
    running: Running,
    prompt: Prompt,
    attend: Callable[[Rows, Config, Ops], Attend],
    c: Config,
    ops: Ops,
) -> tuple[Running, Sampled]:
    rows, length = prompt.rows, prompt.tokens.shape[1] - 1
    real, attention = rows.real(length), attend(rows, c, ops)
    args = (attention, real, c, ops)
    hidden, held = cached.trunk(model, prompt.tokens[:, :-1], running.cache.tokens, *args)
    end = jnp.maximum(rows.counts - 1, 0)[:, None]
    last = jnp.take_along_axis(hidden, end[..., None], axis=1)
    positions = (rows.starts + rows.counts)[:, None]
    sampled, logprobs = sample(_logits(model, last), prompt.sampling, positions)
    known = jnp.take_along_axis(prompt.tokens, end + 1, axis=1)
    ended = known < 0
    following = jnp.where(ended, sampled, known)
    tokens = following
    if running.tokens.shape[1] > 1:
        at_end = jnp.arange(length)[None] == end
        after = jnp.where(at_end, following, prompt.tokens[:, 1:])
        deep, held = cached.deeper(model, hidden, after, held, *args)
        deep = jnp.take_along_axis(deep, end[..., None], axis=1)
        draft = jnp.argmax(_logits(model, deep), axis=-1).astype(jnp.int32)
        tokens = jnp.concatenate([following, draft], axis=1)
    over = jnp.any(sampled == prompt.ends, axis=1)
    left = jnp.where(ended[:, 0] & ~over, jnp.maximum(prompt.left - 1, 0), 0)

    put = lambda all, some: all.at[rows.slots].set(some, mode="drop")  # noqa: E731
    cache = Cache(held, put(running.cache.lengths, rows.starts + rows.counts))
    sampling = jax.tree.map(put, running.sampling, prompt.sampling)
    running = Running(
        cache, put(running.tokens, tokens), put(running.left, left), sampling, put(running.ends, prompt.ends)
    )
    counts = (ended[:, 0] & (rows.counts > 0)).astype(jnp.int32)
    return running, Sampled(sampled, logprobs, counts)


def _step(model: Served, running: Running, c: Config, ops: Ops) -> tuple[Running, Sampled]:
    tokens, lengths = running.tokens, running.cache.lengths
    slots, length = jnp.arange(tokens.shape[0]), tokens.shape[1]
    goes_on = running.left > 0
    rows = mesh.vary(Rows(slots, lengths, jnp.where(goes_on, length, 0)))
    args = (cached.further_tokens(rows, c, ops), rows.real(length), c, ops)
    hidden, held = cached.trunk(model, tokens, running.cache.tokens, *args)
    positions = lengths[:, None] + jnp.arange(1, length + 1)[None]
    sampled, logprobs = sample(_logits(model, hidden), running.sampling, positions)

    # Right so far: all before were the drafts that the step went by, and none of them ended the sequence.
    over = jnp.any(sampled[..., None] == running.ends[:, None], axis=-1)
    follows = (sampled[:, :-1] == tokens[:, 1:]) & ~over[:, :-1]
    right = jnp.cumprod(jnp.pad(follows.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=1), axis=1)
    counts = jnp.minimum(jnp.sum(right, axis=1), running.left)
    ended = jnp.any(over & (jnp.arange(length)[None] < counts[:, None]), axis=1)
    end = jnp.maximum(counts - 1, 0)[:, None]
    new = jnp.take_along_axis(sampled, end, axis=1)
    if length > 1:
        deep, held = cached.deeper(model, hidden, sampled, held, *args)
        deep = jnp.take_along_axis(deep, end[..., None], axis=1)
        draft = jnp.argmax(_logits(model, deep), axis=-1).astype(jnp.int32)
        new = jnp.concatenate([new, draft], axis=1)
    running = running.replace(
        cache=Cache(held, lengths + counts),
        tokens=jnp.where(goes_on[:, None], new, tokens),
        left=jnp.where(ended, 0, running.left - counts),
    )
    return running, Sampled(sampled, logprobs, counts)
