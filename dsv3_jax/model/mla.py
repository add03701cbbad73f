"""Multi-head latent attention (arXiv:2412.19437, section 2.1.1, equations 1-11)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import struct
from jax import P
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.mesh import EVERYWHERE
from dsv3_jax.model.layers import Draw, ones, rms_norm
from dsv3_jax.model.rope import rotate
from dsv3_jax.module import LINEAR, Module
from dsv3_jax.ops import Ops
from dsv3_jax.ops.recompute import keep


class Query(Module):
    """Queries through a latent of rank Q: each head's N non-rotary columns, then its R rotary ones."""

    down: Float[Array, "D Q"] = struct.field(metadata=LINEAR)
    norm: Float[Array, " Q"]
    up: Float[Array, "Q HX"] = struct.field(metadata=LINEAR)

    @classmethod
    def init(cls, draw: Draw, c: Config, rank: int) -> "Query":
        """Weights for a latent of the given rank."""
        a, b = draw.split(2)
        return cls(
            down=a.normal((c.d_model, rank), P(EVERYWHERE, None)),
            norm=ones(rank),
            up=b.normal((rank, c.heads * (c.d_nope + c.d_rope)), P(None, EVERYWHERE)),
        )

    def __call__(self, x: Float[Array, "B S D"], c: Config, ops: Ops) -> Float[Array, "B S HX"]:
        """Equations 6-8."""
        latent = keep(ops.matmul(x, self.down), "latent")
        return ops.matmul(rms_norm(latent, self.norm, c.latent_norm_eps), self.up)


class DirectQuery(Module):
    """Queries without a latent, as in the smaller models of the family."""

    up: Float[Array, "D HX"] = struct.field(metadata=LINEAR)

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "DirectQuery":
        """One matrix."""
        return cls(up=draw.normal((c.d_model, c.heads * (c.d_nope + c.d_rope)), P(None, EVERYWHERE)))

    def __call__(self, x: Float[Array, "B S D"], c: Config, ops: Ops) -> Float[Array, "B S HX"]:
        """A linear layer."""
        return keep(ops.matmul(x, self.up), "latent")


class MLA(Module):
    """Keys and values come from one latent of rank C a token, and a rotary key that all heads share."""

    query: Query | DirectQuery
    kv_down: Float[Array, "D CR"] = struct.field(
        metadata=LINEAR
    )  # the latent's C columns, then the shared key's R
    kv_norm: Float[Array, " C"]
    kv_up: Float[Array, "C HY"] = struct.field(
        metadata=LINEAR
    )  # each head's N key columns, then its V value columns
    out: Float[Array, "HV D"] = struct.field(metadata=LINEAR)

    @classmethod
    def init(cls, draw: Draw, c: Config) -> "MLA":
        """Weights of one layer."""
        k = draw.split(4)
        return cls(
            query=DirectQuery.init(k[0], c) if c.q_rank is None else Query.init(k[0], c, c.q_rank),
            kv_down=k[1].normal((c.d_model, c.kv_rank + c.d_rope), P(EVERYWHERE, None)),
            kv_norm=ones(c.kv_rank),
            kv_up=k[2].normal((c.kv_rank, c.heads * (c.d_nope + c.d_value)), P(None, EVERYWHERE)),
            out=k[3].normal((c.heads * c.d_value, c.d_model), P(None, EVERYWHERE)),
        )

    def __call__(
        self, x: Float[Array, "B S D"], segments: Int[Array, "B S"], c: Config, ops: Ops
    ) -> Float[Array, "B S D"]:
        """Attends to earlier positions of the same segment."""
        fresh = self.project(x, ops.context.numbers(x.shape[1]), c, ops)
        return self.over_fresh(fresh, segments, c, ops)

    def project(
        self, x: Float[Array, "B S D"], positions: Int[Array, "#B S"], c: Config, ops: Ops
    ) -> "Projected":
        """Queries, and the numbers of each token that its keys and values come from."""
        b, s, _ = x.shape
        q = self.query(x, c, ops).reshape(b, s, c.heads, c.d_nope + c.d_rope)
        q_nope, q_rope = jnp.split(q, [c.d_nope], axis=-1)
        latent, k_rope = jnp.split(keep(ops.matmul(x, self.kv_down), "latent"), [c.kv_rank], axis=-1)
        return Projected(
            q_nope,
            rotate(q_rope, positions, c),
            rms_norm(latent, self.kv_norm, c.latent_norm_eps),
            rotate(k_rope[:, :, None], positions, c),
        )

    def over_fresh(
        self, fresh: "Projected", segments: Int[Array, "B S"], c: Config, ops: Ops
    ) -> Float[Array, "B S D"]:
        """Attention among tokens that are all at hand, with keys and values of every head."""
        b, s, _ = fresh.latent.shape
        kv = ops.matmul(fresh.latent, self.kv_up).reshape(b, s, c.heads, c.d_nope + c.d_value)
        k_nope, v = jnp.split(kv, [c.d_nope], axis=-1)
        q = jnp.concatenate([fresh.q_nope, fresh.q_rope], axis=-1)
        k = jnp.concatenate([k_nope, jnp.broadcast_to(fresh.k_rope, fresh.q_rope.shape)], axis=-1)
        q, k, v = map(ops.context.by_heads, (q, k, v))
        return ops.attend(q, k, v, c.softmax_scale, ops.context.whole(segments), self.out, ops.context)

    def over_cached(
        self,
        fresh: "Projected",
        cached: Float[Array, "B most CR"],
        lengths: Int[Array, " B"],
        c: Config,
        ops: Ops,
    ) -> Float[Array, "B S D"]:
        """Attention of each sequence's newest tokens over its cached ones, themselves among them.

        The up-projections are absorbed: that of keys into the query, and that of values after the sum, so
        that no token's keys and values are ever made (arXiv:2405.04434, section 2.1.2).

        Args:
            cached: `Projected.cached` of the tokens so far; from `lengths` on anything finite.
            lengths: tokens, the fresh ones included.
        """
        up = ops.matrix(self.kv_up).reshape(c.kv_rank, c.heads, c.d_nope + c.d_value)
        keys, values = jnp.split(up, [c.d_nope], axis=-1)
        dtype, total = fresh.latent.dtype, jnp.float32
        absorbed = jnp.einsum("bshn,chn->bshc", fresh.q_nope, keys, preferred_element_type=total)
        q = jnp.concatenate([absorbed.astype(dtype), fresh.q_rope], axis=-1)
        sums = ops.attend_cached(q, cached, lengths, c.softmax_scale, c.kv_rank)
        y = jnp.einsum("bshc,chv->bshv", sums, values, preferred_element_type=total).astype(dtype)
        return ops.matmul(y.reshape(*y.shape[:2], -1), self.out)


class Projected(NamedTuple):
    """What attention needs of tokens; the keys and values of every head follow from the last two."""

    q_nope: Float[Array, "B S H N"]
    q_rope: Float[Array, "B S H R"]
    latent: Float[Array, "B S C"]
    k_rope: Float[Array, "B S 1 R"]

    @property
    def cached(self) -> Float[Array, "B S CR"]:
        """All that later tokens will ask for: the normed latent, then the rotated key that heads share."""
        return jnp.concatenate([self.latent, self.k_rope[:, :, 0]], axis=-1)
