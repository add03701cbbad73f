"""Multi-token prediction: further blocks that predict further tokens (arXiv:2412.19437, section 2.2)."""

import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.mesh import EVERYWHERE
from dsv3_jax.model.balance import Balance
from dsv3_jax.model.block import RoutedBlock
from dsv3_jax.model.layers import Draw, ones, rms_norm
from dsv3_jax.module import Module
from dsv3_jax.ops import Ops


class MTP(Module):
    """One depth: joins the previous depth's hidden state with the embedding of the next token.

    Embedding and head are the main model's: it is given embeddings, and its output goes to the same head.
    """

    embed_norm: Float[Array, " D"]
    hidden_norm: Float[Array, " D"]
    join: Float[
        Array, "2D D"
    ]  # embedding rows first, hidden rows last, as released; the report prints the reverse
    block: RoutedBlock
    norm: Float[Array, " D"]

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "MTP":
        """Weights of one depth."""
        j, b = draw.split(2)
        return cls(
            embed_norm=ones(c.d_model),
            hidden_norm=ones(c.d_model),
            join=j.normal((2 * c.d_model, c.d_model), P(None, EVERYWHERE)),
            block=RoutedBlock.init(b, c),
            norm=ones(c.d_model),
        )

    def __call__(
        self,
        hidden: Float[Array, "B S D"],
        embedded: Float[Array, "B S D"],
        bias: Float[Array, " E"],
        segments: Int[Array, "B S"],
        c: Config,
        ops: Ops,
    ) -> tuple[Float[Array, "B S D"], Balance]:
        """The normed hidden state of the next depth, ready for the head.

        Args:
            hidden: the normed output of the main model or of the depth before (before or after its final norm
                is not
                said in the report; the common implementations of the released weights pass it after).
            embedded: at depth k, the embedding of token i + k at position i.
        """
        x, balance = self.block(self.joined(hidden, embedded, c), bias, segments, c, ops)
        return rms_norm(x, self.norm, c.norm_eps), balance

    def joined(
        self, hidden: Float[Array, "B S D"], embedded: Float[Array, "B S D"], c: Config
    ) -> Float[Array, "B S D"]:
        """What the block of this depth is given."""
        both = jnp.concatenate(
            [rms_norm(embedded, self.embed_norm, c.norm_eps), rms_norm(hidden, self.hidden_norm, c.norm_eps)],
            axis=-1,
        )
        # The released eh_proj is not FP8, so this product is not one of the replaceable ones.
        return jnp.dot(both, self.join, preferred_element_type=jnp.float32).astype(hidden.dtype)
