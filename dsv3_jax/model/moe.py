"""DeepSeekMoE: shared experts, fine-grained routed ones, and a choice that balances without a loss.

arXiv:2412.19437, section 2.1.2; arXiv:2408.15664.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.mesh import EVERYWHERE, EXPERT, SHARDS
from dsv3_jax.model.balance import Balance, sequence_loss
from dsv3_jax.model.layers import Draw, FeedForward
from dsv3_jax.module import LINEAR, Module
from dsv3_jax.ops import Ops
from dsv3_jax.ops.dispatch import Route, in_rounds
from dsv3_jax.ops.recompute import keep


class Experts(Module):
    """Routed experts, E of them, split over the expert axis."""

    gate_up: Float[Array, "E D 2F"] = struct.field(metadata=LINEAR)
    down: Float[Array, "E F D"] = struct.field(metadata=LINEAR)

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "Experts":
        """Weights of one layer."""
        a, b = draw.split(2)
        return cls(
            gate_up=a.normal((c.experts, c.d_model, 2 * c.d_expert), P(EXPERT, SHARDS, None)),
            down=b.normal((c.experts, c.d_expert, c.d_model), P(EXPERT, None, SHARDS)),
        )

    def __call__(self, x: Float[Array, "T D"], route: Route, c: Config, ops: Ops) -> Float[Array, "T D"]:
        """The weighted sum of each token's experts, wherever they are."""

        def once(experts: Experts, x: Array, route: Route) -> Array:
            arrived, way = ops.dispatcher.dispatch(x, route, c.experts)
            hidden = ops.grouped_matmul(arrived.rows, experts.gate_up, arrived.sizes)
            # The gate weight multiplies before the down projection, as in DeepSeek's training, so that what
            # travels back is a plain sum; the same in exact arithmetic.
            y = ops.grouped_swiglu_matmul(hidden, arrived.weights, experts.down, arrived.sizes)
            return keep(ops.dispatcher.combine(y, way), "combined")

        return in_rounds(once, ops.dispatcher, self, x, route, c.experts)


class MoE(Module):
    """A router, its experts, and the experts that every token visits."""

    router: Float[Array, "D E"]
    experts: Experts
    shared: FeedForward | None

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "MoE":
        """Weights of one layer; several shared experts are one layer of their summed width."""
        k = draw.split(3)
        return cls(
            router=k[0].normal((c.d_model, c.experts), P(EVERYWHERE, None)),
            experts=Experts.init(k[1], c),
            shared=FeedForward.init(k[2], c, c.shared_experts * c.d_expert) if c.shared_experts else None,
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, " E"],
        segments: Int[Array, "B S"],
        c: Config,
        ops: Ops,
    ) -> tuple[Float[Array, "B S D"], Balance]:
        """The layer's output, and its experts' use by real tokens (padding is routed but not counted)."""
        scores = affinities(x, self.router)
        chosen = select(scores, bias, c)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        # The report's equations leave out route_scale; its released configuration has it.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20) * c.route_scale
        route = Route(chosen.reshape(-1, c.top_k), weights.reshape(-1, c.top_k))
        y = self.experts(x.reshape(-1, c.d_model), route, c, ops).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x, ops)
        real = segments > 0
        counted = jnp.where(real[:, :, None], chosen, c.experts)  # an id past the last expert counts for none
        load = jnp.zeros(c.experts + 1, jnp.int32).at[counted.reshape(-1)].add(1)[: c.experts]
        return y, Balance(load, sequence_loss(scores, chosen, real, ops.context.total))


def affinities(x: Float[Array, "B S D"], router: Float[Array, "D E"]) -> Float[Array, "B S E"]:
    """Sigmoid scores in FP32, from a product of the activations' precision accumulated in FP32."""
    return jax.nn.sigmoid(jnp.dot(x, router, preferred_element_type=jnp.float32))


def select(scores: Float[Array, "B S E"], bias: Float[Array, " E"], c: Config) -> Int[Array, "B S K"]:
    """The K experts of each token, by biased score, inside its best groups.

    A group is as good as the sum of its two best biased scores. The others are masked to minus infinity:
    zero, as in older copies of the code, lets a masked expert win when biased scores are negative.
    """
    biased = jax.lax.stop_gradient(scores + bias[None, None])
    if c.top_groups < c.groups:
        grouped = biased.reshape(*biased.shape[:2], c.groups, c.experts // c.groups)
        quality = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        _, best = jax.lax.top_k(quality, c.top_groups)
        allowed = jnp.sum(jax.nn.one_hot(best, c.groups, dtype=jnp.int32), axis=-2) > 0
        biased = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(biased.shape)
    return jax.lax.top_k(biased, c.top_k)[1]
