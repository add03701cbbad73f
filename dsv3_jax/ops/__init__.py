"""The operations a model is built from. Choosing them is how precision, transport and recomputation are
chosen.

What is not here (embedding, head, router, norms) calls `jnp` directly in the model and therefore keeps its
precision whatever is chosen: the list of arXiv:2412.19437, section 3.3.1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.ops import recompute
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.dispatch import AllToAll, Dispatcher
from pallas_kernels import grouped_matmul as grouped


@dataclass(frozen=True)
class Ops:
    """One choice for every replaceable operation; built once a run, because it is a static argument."""

    dtype: jnp.dtype  # activations, and weights where they are multiplied; master weights are FP32
    matmul: Callable[[Array, Array], Array]
    grouped_matmul: Callable[[Array, Array, Array], Array]
    attention: Callable[..., Array]  # of queries, keys, values, scale and segments
    dispatcher: Dispatcher
    remat: recompute.Remat  # wraps the body of the loop over layers


def float32(remat: recompute.Remat = recompute.nothing) -> Ops:
    """Everything in FP32: the definition that the others are compared with."""
    return Ops(jnp.dtype(jnp.float32), matmul, grouped_matmul, causal_attention, AllToAll(), remat)


def bfloat16(remat: recompute.Remat = recompute.nothing) -> Ops:
    """BF16 products with FP32 accumulation over FP32 master weights."""
    return Ops(jnp.dtype(jnp.bfloat16), matmul, grouped_matmul, causal_attention, AllToAll(), remat)


def matmul(x: Float[Array, "*t I"], w: Float[Array, "I O"]) -> Float[Array, "*t O"]:
    """A linear layer, accumulated in FP32."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def grouped_matmul(
    rows: Float[Array, "T I"], w: Float[Array, "E I O"], sizes: Int[Array, " E"]
) -> Float[Array, "T O"]:
    """The linear layers of all experts on rows sorted by expert; rows of no expert come back undefined."""
    # Outside the kernel's rule JAX itself sums a weight's gradient over the axes it is shared on.
    return grouped.grouped_matmul(rows, mesh.vary(w), sizes)
