"""DeepSeek-V3: embedding, dense blocks, routed blocks, head, and multi-token prediction."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.mesh import EVERYWHERE
from dsv3_jax.model.balance import Balance
from dsv3_jax.model.block import DenseBlock, RoutedBlock
from dsv3_jax.model.layers import Draw, ones, rms_norm
from dsv3_jax.model.loss import cross_entropy
from dsv3_jax.model.mtp import MTP
from dsv3_jax.module import Module
from dsv3_jax.ops import Ops

Layer = TypeVar("Layer", bound=Module)


class Model(Module):
    """All weights. A stack's leaves have a leading layer axis; a stack without layers is None."""

    embed: Float[Array, "W D"]
    dense: DenseBlock | None
    routed: RoutedBlock | None
    norm: Float[Array, " D"]
    head: Float[Array, "D W"]
    mtp: MTP | None

    @classmethod
    def init(cls, key: Array, c: Config, std: float) -> "Model":
        """FP32 weights, matrices with deviation `std`; call it under `jax.jit` with the mesh set."""
        e, d, r, h, m = Draw(key, std).split(5)
        return cls(
            embed=e.normal((c.vocab, c.d_model), P(None, EVERYWHERE)),
            dense=_stack(lambda x: DenseBlock.init(x, c), d, c.dense_layers),
            routed=_stack(lambda x: RoutedBlock.init(x, c), r, c.routed_layers),
            norm=ones(c.d_model),
            head=h.normal((c.d_model, c.vocab), P(EVERYWHERE, None)),
            mtp=_stack(lambda x: MTP.init(x, c), m, c.mtp_depth),
        )


class Losses(NamedTuple):
    """Sums over the sequences of a device."""

    main: Float[Array, ""]  # nats
    mtp: Float[Array, ""]  # nats, the mean over depths
    balance: Float[Array, ""]  # the sequence-wise loss, summed over layers


def losses(
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    tokens: Int[Array, "B S+1+K"],
    segments: Int[Array, "B S+1+K"],
    c: Config,
    ops: Ops,
) -> tuple[Losses, Int[Array, "L E"]]:
    """The losses of local sequences, and how often each expert was chosen.

    A target counts where it lies in the segment of its input and the segment is not padding (0). At depth k,
    position i predicts token i + k + 1, and the last k positions of a sequence predict nothing: their targets
    are past its end, in segment -1.
    """
    here = ahead(segments, 0, c)
    x = first(model, specs, ahead(tokens, 0, c), here, c, ops)
    x, balance = _routed(model, specs, bias, x, here, c, ops)
    sums, load = last(model, specs, bias[c.routed_layers :], x, tokens, segments, c, ops)
    sums = sums._replace(balance=jnp.sum(balance.loss) + sums.balance)
    return sums, jnp.concatenate([balance.load, load])


def trunk(
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    c: Config,
    ops: Ops,
) -> tuple[Float[Array, "B S D"], Balance]:
    """The main model's normed hidden states, and the balance of its routed layers, stacked."""
    x = first(model, specs, tokens, segments, c, ops)
    x, balance = _routed(model, specs, bias, x, segments, c, ops)
    return rms_norm(x, model.norm, c.norm_eps), balance


def first(
    model: Model,
    specs: Model,
    tokens: Int[Array, "B S"],
    segments: Int[Array, "B S"],
    c: Config,
    ops: Ops,
) -> Float[Array, "B S D"]:
    """What comes before the routed layers: the embedding and the dense layers."""
    x = ops.gather(model.embed, specs.embed)[tokens]
    if model.dense is not None:
        x, _ = _scan(lambda x, block: (block(x, segments, c, ops), None), x, model.dense, specs.dense, ops)
    return x


def _routed(
    model: Model,
    specs: Model,
    bias: Float[Array, "L E"],
    x: Float[Array, "B S D"],
    segments: Int[Array, "B S"],
    c: Config,
    ops: Ops,
) -> tuple[Float[Array, "B S D"], Balance]:
    if model.routed is None:
        return x, mesh.vary(Balance(jnp.zeros((0, c.experts), jnp.int32), jnp.zeros(0)))
    layers = (model.routed, bias[: c.routed_layers])
    layer = lambda x, layer: layer[0](x, layer[1], segments, c, ops)  # noqa: E731
    return _scan(layer, x, layers, (specs.routed, P()), ops)


def last(
    model: Model,
    specs: Model,
    bias: Float[Array, "K E"],
    x: Float[Array, "B S D"],
    tokens: Int[Array, "B S+1+K"],
    segments: Int[Array, "B S+1+K"],
    c: Config,
    ops: Ops,
) -> tuple[Losses, Int[Array, "K E"]]:
    """What comes after the routed layers: the main loss, and those of the K depths of MTP with their load."""
    head = ops.gather(model.head, specs.head)
    hidden = rms_norm(x, model.norm, c.norm_eps)
    main = cross_entropy(hidden, head, ahead(tokens, 1, c), counted(segments, 1, c))
    loads, balance_loss, further = [], jnp.zeros_like(main), jnp.zeros_like(main)
    for depth in range(1, c.mtp_depth + 1):
        hidden, balance = deeper(model, specs, bias, hidden, tokens, segments, depth, c, ops)
        target, counts = ahead(tokens, depth + 1, c), counted(segments, depth + 1, c)
        further += cross_entropy(hidden, head, target, counts)
        loads.append(balance.load)
        balance_loss += balance.loss
    load = jnp.stack(loads) if loads else mesh.vary(jnp.zeros((0, c.experts), jnp.int32))
    return Losses(main, further / max(c.mtp_depth, 1), balance_loss), load


def deeper(
    model: Model,
    specs: Model,
    bias: Float[Array, "K E"],
    hidden: Float[Array, "B S D"],
    tokens: Int[Array, "B S+1+K"],
    segments: Int[Array, "B S+1+K"],
    depth: int,
    c: Config,
    ops: Ops,
) -> tuple[Float[Array, "B S D"], Balance]:
    """The hidden states of depth `depth` >= 1 from those of the depth before."""
    assert model.mtp is not None
    one = jax.tree.map(lambda w: w[depth - 1], model.mtp)
    embedded = ops.gather(model.embed, specs.embed)[ahead(tokens, depth, c)]
    # The last positions of a sequence have no token to predict: padding, so that nothing counts them.
    seen = jnp.where(ahead(segments, depth + 1, c) >= 0, ahead(segments, 0, c), 0)

    def run(hidden, weights):
        block, b = weights
        return ops.gather(block, mesh.layer_specs(specs.mtp))(hidden, embedded, b, seen, c, ops)

    return ops.remat(run)(hidden, (one, bias[depth - 1]))


def counted(segments: Int[Array, "B S+1+K"], n: int, c: Config) -> Bool[Array, "B S"]:
    """Whether the token n places further is a target of each position: same segment, not padding."""
    here = ahead(segments, 0, c)
    return (here > 0) & (here == ahead(segments, n, c))


def ahead(x: Int[Array, "*m S+1+K"], n: int, c: Config) -> Int[Array, "*m S"]:
    """What is n places further at each of the S positions."""
    return x[..., n : n + x.shape[-1] - 1 - c.mtp_depth]


def _stack(init: Callable[[Draw], Layer], draw: Draw, layers: int) -> Layer | None:
    return jax.vmap(init)(draw.stacked(layers)) if layers else None


def _scan(layer: Callable, x: Array, stack, stack_specs, ops: Ops):
    """Runs a stack. Weights are gathered, used and dropped one layer at a time."""
    specs = mesh.layer_specs(stack_specs)

    def body(x, weights):
        return layer(x, ops.gather(weights, specs))

    return jax.lax.scan(ops.remat(body), x, stack)
