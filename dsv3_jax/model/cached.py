"""The model on tokens that come a few at a time, beside a cache of what attention needs of those before.

A cached token is C + R numbers a layer: its normed latent and the rotated key that all heads share
(arXiv:2412.19437, section 2.1.1). Everything here is local to a device, whose sequences lie in slots.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model.block import before_attention
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.model import Model, through
from dsv3_jax.ops import Ops


class Cache(struct.PyTreeNode):
    """The tokens of sequences in slots; the layers are those of the main model, then one of MTP if it drafts.

    From its length on a slot holds what is not used, and finite.
    """

    tokens: Float[Array, "L B most CR"]
    lengths: Int[Array, " B"]

    @classmethod
    def init(cls, c: Config, slots: int, most: int, layers: int, dtype) -> "Cache":
        """Empty slots, split over all devices of the mesh; call it under `jax.jit` with the mesh set."""
        tokens = (layers, slots, most, c.kv_rank + c.d_rope)
        return cls(
            jnp.zeros(tokens, dtype, out_sharding=P(None, mesh.AXES)),
            jnp.zeros(slots, jnp.int32, out_sharding=P(mesh.AXES)),
        )


# Of a layer's attention, its input, the layer's number and what is held of all layers.
Attend = Callable[[MLA, Array, Array, Array], tuple[Array, Array]]


class Rows(struct.PyTreeNode):
    """Tokens to run, of as many sequences as there are rows."""

    slots: Int[Array, " b"]  # that they belong to; a number past the last is of a row without a sequence
    starts: Int[Array, " b"]  # tokens that the slot holds
    counts: Int[Array, " b"]  # of the row's first tokens that are real

    def real(self, length: int) -> Int[Array, "b S"]:
        """1 for tokens that are real, 0 for those that fill a row."""
        return (jnp.arange(length)[None] < self.counts[:, None]).astype(jnp.int32)


def first_tokens(rows: Rows, c: Config, ops: Ops) -> Attend:
    """Attention of tokens that no others are before, in full form."""

    def attend(mla: MLA, x: Array, layer: Array, held: Array) -> tuple[Array, Array]:
        fresh = mla.project(x, jnp.arange(x.shape[1])[None], c, ops)
        y = mla.over_fresh(fresh, rows.real(x.shape[1]), c, ops)
        return y, _put(held, layer, rows, fresh.cached)

    return attend


def further_tokens(rows: Rows, c: Config, ops: Ops) -> Attend:
    """Attention of tokens to those that are cached and to each other, in absorbed form."""

    def attend(mla: MLA, x: Array, layer: Array, held: Array) -> tuple[Array, Array]:
        positions = rows.starts[:, None] + jnp.arange(x.shape[1])[None]
        fresh = mla.project(x, positions, c, ops)
        held = _put(held, layer, rows, fresh.cached)
        cached = held.at[layer, rows.slots].get(mode="clip")
        return mla.over_cached(fresh, cached, rows.starts + x.shape[1], c, ops), held

    return attend


def _put(held: Array, layer: Array, rows: Rows, cached: Float[Array, "b S CR"]) -> Array:
    """With tokens at their places, those without a place dropped."""
    positions = rows.starts[:, None] + jnp.arange(cached.shape[1])[None]
    return held.at[layer, rows.slots[:, None], positions].set(cached, mode="drop")


def trunk(
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    tokens: Int[Array, "b S"],
    held: Float[Array, "L B most CR"],
    attend: Attend,
    real: Int[Array, "b S"],
    c: Config,
    ops: Ops,
) -> tuple[Float[Array, "b S D"], Float[Array, "L B most CR"]]:
    """The main model's normed hidden states of tokens, and what is held with these among it."""
    x = ops.gather(model.embed, specs.embed)[tokens]
    layers = jnp.arange(c.layers)
    attended = partial(_attended, attend=attend, c=c)

    def dense(carry, layer):
        block, number = layer
        x, held = attended(block, number, *carry)
        return (block.feed_forward(x, c, ops), held), None

    def routed(carry, layer):
        block, b, number = layer
        x, held = attended(block, number, *carry)
        x, _ = block.feed_forward(x, b, real, c, ops)
        return (x, held), None

    carry = (x, held)
    if model.dense is not None:
        stack = (model.dense, layers[: c.dense_layers])
        carry, _ = through(dense, carry, stack, (specs.dense, P(None)), ops)
    if model.routed is not None:
        stack = (model.routed, bias[: c.routed_layers], layers[c.dense_layers :])
        carry, _ = through(routed, carry, stack, (specs.routed, P(None), P(None)), ops)
    x, held = carry
    return rms_norm(x, model.norm, c.norm_eps), held


def deeper(
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    hidden: Float[Array, "b S D"],
    following: Int[Array, "b S"],
    held: Float[Array, "L B most CR"],
    attend: Attend,
    real: Int[Array, "b S"],
    c: Config,
    ops: Ops,
) -> tuple[Float[Array, "b S D"], Float[Array, "L B most CR"]]:
    """The normed hidden states of MTP's first depth, ready for the head, and what is held.

    Args:
        following: the token after each position.
    """
    assert model.mtp is not None
    one = jax.tree.map(lambda w: w[0], model.mtp)
    mtp = ops.gather(one, mesh.layer_specs(specs.mtp))
    x = mtp.joined(hidden, ops.gather(model.embed, specs.embed)[following], c)
    x, held = _attended(mtp.block, jnp.int32(c.layers), x, held, attend=attend, c=c)
    x, _ = mtp.block.feed_forward(x, bias[c.routed_layers], real, c, ops)
    return rms_norm(x, mtp.norm, c.norm_eps), held


def _attended(block, number: Array, x: Array, held: Array, *, attend: Attend, c: Config):
    y, held = attend(block.attention, before_attention(block, x, c), number, held)
    return x + y, held
