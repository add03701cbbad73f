"""The model on tokens that come a few at a time, beside a cache of what attention needs of those before.

A cached token is C + R numbers a layer: its normed latent and the rotated key that all heads share
(arXiv:2412.19437, section 2.1.1). Everything here is local to a device, whose sequences lie in slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.model.block import DenseBlock, RoutedBlock, before_attention
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.mtp import MTP
from dsv3_jax.module import map_linear
from dsv3_jax.ops import Ops
from dsv3_jax.ops.held import Hold, in_use


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
Attend = Callable[[MLA, Array, int, Array], tuple[Array, Array]]


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

    def attend(mla: MLA, x: Array, layer: int, held: Array) -> tuple[Array, Array]:
        fresh = mla.project(x, jnp.arange(x.shape[1])[None], c, ops)
        y = mla.over_fresh(fresh, rows.real(x.shape[1]), c, ops)
        return y, _put(held, layer, rows, fresh.cached)

    return attend


def further_tokens(rows: Rows, c: Config, ops: Ops) -> Attend:
    """Attention of tokens to those that are cached and to each other, in absorbed form."""

    def attend(mla: MLA, x: Array, layer: int, held: Array) -> tuple[Array, Array]:
        positions = rows.starts[:, None] + jnp.arange(x.shape[1])[None]
        fresh = mla.project(x, positions, c, ops)
        held = _put(held, layer, rows, fresh.cached)
        cached = held.at[layer, rows.slots].get(mode="clip")
        return mla.over_cached(fresh, cached, rows.starts + x.shape[1], c, ops), held

    return attend


def _put(held: Array, layer: int, rows: Rows, cached: Float[Array, "b S CR"]) -> Array:
    """With tokens at their places, those without a place dropped."""
    positions = rows.starts[:, None] + jnp.arange(cached.shape[1])[None]
    return held.at[layer, rows.slots[:, None], positions].set(cached, mode="drop")


class Served(struct.PyTreeNode):
    """The weights of a model one layer after another, as programs of a few tokens want them.

    They are in the type of the products, whole on each device but for the experts, which are split over the
    expert axis alone: nothing is cast, sliced out of a stack or assembled while text is written. Those of
    linear layers may be held otherwise, and become what products read when their layer is run.
    """

    embed: Float[Array, "W D"]
    layers: tuple[tuple[DenseBlock | RoutedBlock, Float[Array, " E"] | None], ...]  # with expert biases
    norm: Float[Array, " D"]
    head: Float[Array, "D W"]
    mtp: tuple[MTP, Float[Array, " E"]] | None  # the first depth

    @classmethod
    def of(cls, read: Callable[..., Any], c: Config, dtype, hold: Hold) -> "Served":
        """From the weights of training, of which no more than a layer is asked for at once.

        Args:
            read: gives what a function selects of `{"model": Model, "bias": Float[Array, "L E"]}`; given the
                number of a row too, of stacks that row alone. It is asked for everything once.
            c: sizes.
            dtype: of products.
            hold: of `dsv3_jax/ops/held.py`.
        """
        made = partial(_served, dtype=dtype, hold=hold)
        of_row = jax.jit(lambda row: made(jax.tree.map(lambda w: w[0], row)))

        def layers(stack: str, count: int) -> list[Any]:
            return [of_row(read(lambda w: getattr(w["model"], stack), n)) for n in range(count)]

        model, bias = read(lambda w: (w["model"].replace(dense=None, routed=None, mtp=None), w["bias"]))
        model, biases = jax.jit(made)(model), jax.jit(jnp.unstack)(bias)
        dense, routed = layers("dense", c.dense_layers), layers("routed", c.routed_layers)
        deeper = layers("mtp", c.mtp_depth)
        return cls(
            model.embed,
            (*((block, None) for block in dense), *zip(routed, biases, strict=False)),
            model.norm,
            model.head,
            (deeper[0], biases[c.routed_layers]) if deeper else None,
        )


def _served(part: Any, dtype, hold: Hold) -> Any:
    """Weights that are in no stack, or of one layer, as they are while text is written."""
    place = lambda w: jax.reshard(w, P(*(a if a == mesh.EXPERT else None for a in mesh.spec(w))))  # noqa: E731
    cast = jax.tree.map(place, mesh.cast(part, mesh.specs(part), dtype))
    return map_linear(hold, cast, jax.tree.map(place, part))


def trunk(
    model: Served,
    tokens: Int[Array, "b S"],
    held: Float[Array, "L B most CR"],
    attend: Attend,
    real: Int[Array, "b S"],
    c: Config,
    ops: Ops,
) -> tuple[Float[Array, "b S D"], Float[Array, "L B most CR"]]:
    """The main model's normed hidden states of tokens, and what is held with these among it."""
    x = model.embed[tokens]
    for number, layer in enumerate(model.layers):
        x, held = _layer(layer, number, x, held, attend, real, c, ops)
    return rms_norm(x, model.norm, c.norm_eps), held


def deeper(
    model: Served,
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
    mtp, bias = model.mtp
    x = mtp.joined(hidden, model.embed[following], c)
    x, held = _layer((mtp.block, bias), c.layers, x, held, attend, real, c, ops)
    return rms_norm(x, mtp.norm, c.norm_eps), held


def _layer(
    layer: tuple, number: int, x: Array, held: Array, attend: Attend, real: Array, c: Config, ops: Ops
) -> tuple[Array, Array]:
    block, bias = in_use(layer[0], ops.of_blocks), layer[1]
    y, held = attend(block.attention, before_attention(block, x, c), number, held)
    if isinstance(block, DenseBlock):
        return block.feed_forward(x + y, c, ops), held
    x, _ = block.feed_forward(x + y, bias, real, c, ops)
    return x, held
