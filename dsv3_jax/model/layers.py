"""The small parts: initialisation, RMSNorm and the SwiGLU feed-forward layer."""

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float

from dsv3_jax.config import Config
from dsv3_jax.mesh import DATA
from dsv3_jax.module import Module
from dsv3_jax.ops import Ops
from dsv3_jax.ops.recompute import keep

INIT_STD = 0.006  # of every learnable matrix (arXiv:2412.19437, section 4.2); norm gains start at one


def draw(key: Array, shape: tuple[int, ...], spec: P) -> Array:
    """A normal FP32 weight, born where it will live."""
    return INIT_STD * jax.random.normal(key, shape, jnp.float32, out_sharding=spec)


def ones(width: int) -> Float[Array, " D"]:
    """The gain of a norm, the same on every device."""
    return jnp.ones(width, jnp.float32, out_sharding=P())


def rms_norm(x: Float[Array, "*b D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "*b D"]:
    """x / sqrt(mean(x^2) + eps) * gain, in FP32, returned in the type of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * jnp.expand_dims(gain, range(x.ndim - 1))).astype(x.dtype)


class FeedForward(Module):
    """down(silu(gate(x)) * up(x)): the dense layers, and the shared experts."""

    gate: Float[Array, "D F"]
    up: Float[Array, "D F"]
    down: Float[Array, "F D"]

    @classmethod
    def init(cls, key: Array, c: Config, width: int) -> "FeedForward":
        """A layer of hidden width `width`."""
        k = jax.random.split(key, 3)
        return cls(
            gate=draw(k[0], (c.d_model, width), P(DATA, None)),
            up=draw(k[1], (c.d_model, width), P(DATA, None)),
            down=draw(k[2], (width, c.d_model), P(None, DATA)),
        )

    def __call__(self, x: Float[Array, "*t D"], ops: Ops) -> Float[Array, "*t D"]:
        """Applies the layer to each token."""
        gate, up = keep(ops.matmul(x, self.gate), "hidden"), keep(ops.matmul(x, self.up), "hidden")
        return ops.matmul(jax.nn.silu(gate) * up, self.down)
