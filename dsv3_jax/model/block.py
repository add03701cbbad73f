"""The transformer block: attention and a feed-forward layer, each normed before and added after."""

from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.balance import Balance
from dsv3_jax.model.layers import Draw, FeedForward, ones, rms_norm
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE
from dsv3_jax.module import Module
from dsv3_jax.ops import Ops
from dsv3_jax.ops.recompute import keep


class DenseBlock(Module):
    """One of the first layers, whose feed-forward part is not routed."""

    attention_norm: Float[Array, " D"]
    attention: MLA
    ffn_norm: Float[Array, " D"]
    ffn: FeedForward

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "DenseBlock":
        """Weights of one layer."""
        a, f = draw.split(2)
        return cls(ones(c.d_model), MLA.init(a, c), ones(c.d_model), FeedForward.init(f, c, c.d_dense))

    def __call__(
        self, x: Float[Array, "B S D"], segments: Int[Array, "B S"], c: Config, ops: Ops
    ) -> Float[Array, "B S D"]:
        """x + attention(norm(x)), then x + ffn(norm(x))."""
        return self.feed_forward(_attend(self, x, segments, c, ops), c, ops)

    def feed_forward(self, x: Float[Array, "B S D"], c: Config, ops: Ops) -> Float[Array, "B S D"]:
        """The second half alone."""
        return x + self.ffn(rms_norm(x, self.ffn_norm, c.norm_eps), ops)


class RoutedBlock(Module):
    """A layer whose feed-forward part is a mixture of experts."""

    attention_norm: Float[Array, " D"]
    attention: MLA
    ffn_norm: Float[Array, " D"]
    ffn: MoE

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "RoutedBlock":
        """Weights of one layer."""
        a, f = draw.split(2)
        return cls(ones(c.d_model), MLA.init(a, c), ones(c.d_model), MoE.init(f, c))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, " E"],
        segments: Int[Array, "B S"],
        c: Config,
        ops: Ops,
    ) -> tuple[Float[Array, "B S D"], Balance]:
        """x + attention(norm(x)), then x + experts(norm(x)); and how the experts were used."""
        return self.feed_forward(_attend(self, x, segments, c, ops), bias, segments, c, ops)

    def feed_forward(
        self,
        x: Float[Array, "B S D"],
        bias: Float[Array, " E"],
        segments: Int[Array, "B S"],
        c: Config,
        ops: Ops,
    ) -> tuple[Float[Array, "B S D"], Balance]:
        """The second half alone."""
        y, balance = self.ffn(rms_norm(x, self.ffn_norm, c.norm_eps), bias, segments, c, ops)
        return x + y, balance


def before_attention(block: DenseBlock | RoutedBlock, x: Array, c: Config) -> Array:
    """What the attention of a block is given."""
    return rms_norm(x, block.attention_norm, c.norm_eps)


def _attend(block: DenseBlock | RoutedBlock, x: Array, segments: Array, c: Config, ops: Ops) -> Array:
    return keep(x + block.attention(before_attention(block, x, c), segments, c, ops), "residual")
