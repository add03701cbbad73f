"""The small parts: initialisation, RMSNorm and the SwiGLU feed-forward layer."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import P
from jaxtyping import Array, Float

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.mesh import EVERYWHERE
from dsv3_jax.module import LINEAR, Module
from dsv3_jax.ops import Ops


class Draw(Module):
    """Where fresh matrices come from: a key, and one standard deviation. Norm gains start at one."""

    key: Array
    std: float = struct.field(pytree_node=False)

    def split(self, n: int) -> tuple["Draw", ...]:
        """Independent ones."""
        return tuple(Draw(key, self.std) for key in jax.random.split(self.key, n))

    def stacked(self, n: int) -> "Draw":
        """Independent ones along a leading axis, for `jax.vmap`."""
        return Draw(jax.random.split(self.key, n), self.std)

    def normal(self, shape: tuple[int, ...], spec: P) -> Array:
        """A normal FP32 weight, born where it will live."""
        layout = mesh.dividing(spec, shape)
        return self.std * jax.random.normal(self.key, shape, jnp.float32, out_sharding=layout)


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

    Gate and up-projection are one matrix, so that their input is read, and quantised, once.
    """

    gate_up: Float[Array, "D 2F"] = struct.field(
        metadata=LINEAR
    )  # columns of the gate, then of the up-projection
    down: Float[Array, "F D"] = struct.field(metadata=LINEAR)

    @classmethod
    def init(cls, draw: Draw, c: Config, width: int) -> "FeedForward":
        """A layer of hidden width `width`."""
        a, b = draw.split(2)
        return cls(
            gate_up=a.normal((c.d_model, 2 * width), P(EVERYWHERE, None)),
            down=b.normal((width, c.d_model), P(None, EVERYWHERE)),
        )

    def __call__(self, x: Float[Array, "*t D"], ops: Ops) -> Float[Array, "*t D"]:
        """Applies the layer to each token."""
        return ops.swiglu_matmul(ops.matmul(x, self.gate_up), self.down)
