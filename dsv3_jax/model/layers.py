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
    """down(silu(gate(x)) * up(x)): the dense layers, and the shared experts.

    Gate and up-projection are two halves of one matrix, so that their input is read, and quantised, once.
    """

    gate_up: Float[Array, "D 2 F"]
    down: Float[Array, "F D"]

    @classmethod
    def init(cls, key: Array, c: Config, width: int) -> "FeedForward":
        """A layer of hidden width `width`."""
        a, b = jax.random.split(key)
        return cls(
            gate_up=draw(a, (c.d_model, 2, width), P(DATA, None, None)),
            down=draw(b, (width, c.d_model), P(None, DATA)),
        )

    def __call__(self, x: Float[Array, "*t D"], ops: Ops) -> Float[Array, "*t D"]:
        """Applies the layer to each token."""
        return ops.matmul(swiglu(keep(ops.matmul(x, merged(self.gate_up)), "hidden")), self.down)


def merged(gate_up: Float[Array, "*e D 2 F"]) -> Float[Array, "*e D 2F"]:
    """Gate columns, then those of the up-projection."""
    return gate_up.reshape(*gate_up.shape[:-2], -1)


def swiglu(hidden: Float[Array, "*t 2F"]) -> Float[Array, "*t F"]:
    """silu(gate) * up, of gate columns and then those of the up-projection."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up
