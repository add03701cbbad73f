"""The replaceable operations in one floating-point type, BF16 or FP32, with FP32 sums."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax import mesh
from dsv3_jax.ops.context import WHOLE, Context
from dsv3_jax.ops.recompute import keep
from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import mla_attention, mla_decode

ALIGNMENT = (
    128  # rows; where experts start at multiples of it, tiles of kernels and of scales hold one expert
)


def prepare(weights, specs, dtype: jnp.dtype):
    """Weights in the type of the products, laid out as they were."""
    return mesh.cast(weights, specs, dtype), specs


def attach(weights, prepared):
    """Nothing is to be added: weights are cast where they are gathered."""
    return weights


def stand_in(prepared):
    """The weights themselves."""
    return prepared


def matrix(w: Float[Array, "*g I O"]) -> Float[Array, "*g I O"]:
    """A weight is one."""
    return w


def gather(weights, specs, dtype: jnp.dtype):
    """Assembles sharded weights in the type of the products."""
    return mesh.gather(mesh.cast(weights, specs, dtype), specs)


def matmul(x: Float[Array, "*t I"], w: Float[Array, "I O"]) -> Float[Array, "*t O"]:
    """A linear layer, accumulated in FP32."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def swiglu_matmul(hidden: Float[Array, "*t 2F"], w: Float[Array, "F O"]) -> Float[Array, "*t O"]:
    """The down projection of silu(gate) * up."""
    return matmul(_swiglu(keep(hidden, "hidden")), w)


def grouped_matmul(
    rows: Float[Array, "T I"], w: Float[Array, "E I O"], sizes: Int[Array, " E"], *, alignment: int
) -> Float[Array, "T O"]:
    """The linear layers of all experts on rows sorted by expert; rows of no expert come back undefined."""
    return _grouped(keep(rows, "routed_rows"), w, sizes, alignment)


def grouped_swiglu_matmul(
    hidden: Float[Array, "T 2F"],
    weights: Float[Array, " T"],
    w: Float[Array, "E F O"],
    sizes: Int[Array, " E"],
    *,
    alignment: int,
) -> Float[Array, "T O"]:
    """The down projections of all experts, of silu(gate) * up * weight."""
    weighted = _swiglu(keep(hidden, "hidden")) * weights[:, None].astype(hidden.dtype)
    return _grouped(weighted, w, sizes, alignment)


def attend(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
    w: Float[Array, "HV D"],
    context: Context = WHOLE,
) -> Float[Array, "B S/n D"]:
    """Causal attention inside documents, of the heads that are here, and its output projection."""
    y: Array = context.by_tokens(attention(q, k, v, scale, segments))
    return matmul(y.reshape(*y.shape[:2], -1), w)


def attend_cached(
    q: Float[Array, "B S H CR"],
    cached: Float[Array, "B most CR"],
    lengths: Int[Array, " B"],
    scale: float,
    width: int,
) -> Float[Array, "B S H C"]:
    """Attention of absorbed queries over cached tokens, whose first `width` numbers are their values too."""
    return mla_decode.decode(q, cached, lengths, scale, width=width)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q: Array, k: Array, v: Array, scale: float, segments: Array) -> Float[Array, "B S H V"]:
    """The kernels' attention, with what its gradient reads marked as kept, so that it never runs twice."""
    return mla_attention.forward(q, k, v, scale, segments)[0]


def _attention_forward(q, k, v, scale, segments):
    y, log_z = mla_attention.forward(q, k, v, scale, segments)
    y = keep(y, "attention")
    return y, (q, k, v, segments, y, keep(log_z, "attention"))


def _attention_backward(scale, saved, g):
    q, k, v, segments, y, log_z = saved
    return *mla_attention.backward(q, k, v, scale, segments, y, log_z, g), None


attention.defvjp(_attention_forward, _attention_backward)


def _swiglu(hidden: Float[Array, "*t 2F"]) -> Float[Array, "*t F"]:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _grouped(rows: Array, w: Array, sizes: Array, alignment: int) -> Array:
    # Outside the kernel's rule JAX itself sums a weight's gradient over the axes it is shared on.
    return grouped.matmul(rows, mesh.vary(w), sizes, alignment)
