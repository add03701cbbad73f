"""FP8 training with fine-grained scales (arXiv:2412.19437, section 3.3): three products of every linear
layer.

Each rule below quantises its input by row and 128 columns, multiplies it by a weight quantised in 128 x 128
blocks, and keeps FP8 for the backward pass. There the gradient is quantised by row for the gradient of the
input, and both it and the kept rows again along tokens for the gradient of the weight, which comes out in
FP32. All is E4M3.

What moves between devices before a product (tokens to their experts, and gradients back from `combine`), and
what attention gives to its projection, have power-of-two scales, so that quantising along the other axis adds
no error.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import P
from jaxtyping import Array, Float, Float32, Int

from dsv3_jax import mesh
from dsv3_jax.module import Module, map_linear
from dsv3_jax.ops import plain
from dsv3_jax.ops.context import WHOLE, Context
from dsv3_jax.ops.plain import ALIGNMENT
from dsv3_jax.ops.recompute import keep
from pallas_kernels import fp8_matmul as dense
from pallas_kernels import grouped_matmul as grouped
from pallas_kernels import mla_attention, quantize
from pallas_kernels.scaled import E4M3, Scale, Scaled, amax, dequantize, exact, power_of_two, spread

_BLOCK = 128


class Weight(Module):
    """A matrix on its way to its products, or a stack of them."""

    master: Float32[Array, "*g I O"]  # read by nothing: its gradient is the weight's
    blocks: Scaled  # [*g, I, O]


def prepare(weights, specs):
    """Weights as 128 x 128 blocks, which may lie on several devices, the others in BF16; and their layout."""

    def one(w, spec):
        return w if isinstance(w, Scaled) else mesh.cast(w, spec, jnp.bfloat16)

    blocks = map_linear(_blocks, jax.lax.stop_gradient(weights), specs)
    prepared = jax.tree.map(one, blocks, specs, is_leaf=lambda w: isinstance(w, Scaled))
    return prepared, map_linear(lambda s: Scaled(s, cast(Any, P()), (_BLOCK, _BLOCK)), specs)


def attach(weights, prepared):
    """Matrices of products beside their blocks."""
    return map_linear(Weight, weights, prepared)


def stand_in(prepared):
    """Zeros for the matrices of products, which are multiplied as blocks."""
    return map_linear(lambda w: mesh.vary_like(jnp.zeros(w.values.shape), w.values), prepared)


def of_blocks(blocks: Scaled) -> Weight:
    """A weight that has no gradient."""
    return Weight(cast(Array, None), blocks)


def matrix(w: Weight) -> Float[Array, "*g I O"]:
    """A weight in BF16, for what is no product of this file."""
    return dequantize(w.blocks).astype(jnp.bfloat16)


def gather(weights, specs):
    """Assembles weights sharded over data: FP8 for the products of this file, BF16 for the others."""

    def one(w, spec):
        if not isinstance(w, Weight):
            return plain.gather(w, spec, jnp.bfloat16)
        values = mesh.gather(w.blocks.values, spec)
        return Weight(mesh.gather(w.master, spec), Scaled(values, w.blocks.scales, w.blocks.tile))

    return jax.tree.map(one, weights, specs, is_leaf=lambda w: isinstance(w, Weight))


def _blocks(w: Float32[Array, "*g I O"], spec) -> Scaled:
    """A block may lie on several devices, which then agree on its scale."""
    axis = mesh.shard_axis(spec)
    over = () if axis is None else spec[axis]
    sharded = None if axis is None else axis - w.ndim
    tile, across = ((1, _BLOCK), (_BLOCK, 1)) if sharded == -2 else ((_BLOCK, 1), (1, _BLOCK))
    largest = amax(w, tile)
    if sharded is not None:
        largest = jax.lax.all_gather(largest, over, axis=w.ndim + sharded, tiled=True)
    scales = exact(amax(largest, across))
    mine = spread(scales, across, largest.shape)
    if sharded is not None:
        first = jax.lax.axis_index(over) * w.shape[sharded]
        mine = jax.lax.dynamic_slice_in_dim(mine, first, w.shape[sharded], w.ndim + sharded)
    return Scaled((w * spread(1 / mine, tile, w.shape)).astype(E4M3), scales, (_BLOCK, _BLOCK))


class Products(NamedTuple):
    """The products of dense layers, or of experts: those take the rows of each expert as a last argument."""

    multiply: Callable[..., Array]  # [T, K] x [N, K]
    weight_gradient: Callable[..., Array]  # [I, T] x [O, T], summed over T in FP32
    moved: Scale  # of what has just come from other devices
    input: Callable[[Scaled], Scaled]  # says whether the input is kept, or computed again from what is
    gradient: Callable[[Array, Scale], tuple[Scaled, Scaled]]  # of the output, by row and along tokens


def by_row_and_column(g: Float[Array, "T O"], scale: Scale) -> tuple[Scaled, Scaled]:
    """A gradient's own scales along each axis that it is summed over."""
    return quantize.quantize(g, scale=scale), quantize.transposed(g, scale=scale)


DENSE = Products(
    dense.matmul, partial(dense.matmul, dtype=jnp.float32), exact, lambda rows: rows, by_row_and_column
)
EXPERTS = Products(
    partial(grouped.fp8_matmul, alignment=ALIGNMENT),
    partial(grouped.fp8_weight_gradient, alignment=ALIGNMENT),
    power_of_two,
    lambda rows: _kept(rows, "routed_rows"),
    by_row_and_column,
)


def matmul(x: Float[Array, "*t I"], w: Weight, products: Products = DENSE) -> Float[Array, "*t O"]:
    """A linear layer."""
    y: Array = _linear(products, _rows(x), w)
    return y.reshape(*x.shape[:-1], -1)


def swiglu_matmul(
    hidden: Float[Array, "*t 2F"], w: Weight, products: Products = DENSE
) -> Float[Array, "*t O"]:
    """The down projection of silu(gate) * up."""
    y: Array = _swiglu_linear(products, _rows(hidden), None, w)
    return y.reshape(*hidden.shape[:-1], -1)


def grouped_matmul(
    rows: Float[Array, "T I"], w: Weight, sizes: Int[Array, " E"], products: Products = EXPERTS
) -> Float[Array, "T O"]:
    """The linear layers of all experts on rows sorted by expert; rows of no expert come back undefined."""
    return _linear(products, rows, w, sizes)


def grouped_swiglu_matmul(
    hidden: Float[Array, "T 2F"],
    weights: Float[Array, " T"],
    w: Weight,
    sizes: Int[Array, " E"],
    products: Products = EXPERTS,
) -> Float[Array, "T O"]:
    """The down projections of all experts, of silu(gate) * up * weight."""
    return _swiglu_linear(products, hidden, weights, w, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(products: Products, x: Array, w: Weight, *sizes: Array) -> Array:
    return _linear_forward(products, x, w, *sizes)[0]


def _linear_forward(products, x, w, *sizes):
    rows = products.input(quantize.quantize(x, scale=products.moved))
    return products.multiply(rows, w.blocks.mT, *sizes), (rows, w.blocks, *sizes)


def _linear_backward(products, saved, g):
    rows, blocks, *sizes = saved
    grows, gcolumns = products.gradient(g, exact)
    dx = products.multiply(grows, blocks, *sizes)
    dw = products.weight_gradient(quantize.transposed(rows, scale=products.moved), gcolumns, *sizes)
    return dx, _gradient(dw), *(None for _ in sizes)


_linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_linear(
    products: Products, hidden: Array, weights: Array | None, w: Weight, *sizes: Array
) -> Array:
    return _swiglu_forward(products, hidden, weights, w, *sizes)[0]


def _swiglu_forward(products, hidden, weights, w, *sizes):
    """Keeps what SwiGLU is computed from, in FP8; its result is computed again."""
    y = products.multiply(quantize.swiglu(hidden, weights), w.blocks.mT, *sizes)
    return y, (_kept(quantize.quantize(hidden), "hidden"), weights, w.blocks, *sizes)


def _swiglu_backward(products, saved, g):
    hidden, weights, blocks, *sizes = saved
    grows, gcolumns = products.gradient(g, products.moved)
    dy = products.multiply(grows, blocks, *sizes)
    dw = products.weight_gradient(quantize.swiglu_transposed(hidden, weights), gcolumns, *sizes)
    return *quantize.swiglu_backward(hidden, weights, dy), _gradient(dw), *(None for _ in sizes)


_swiglu_linear.defvjp(_swiglu_forward, _swiglu_backward)


def attend(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
    w: Weight,
    context: Context = WHOLE,
    products: Products = DENSE,
) -> Float[Array, "B S/n D"]:
    """Causal attention inside documents in BF16, of the heads that are here, and its projection in FP8.

    What lies between is kept once, in 12 bits, for the backward passes of both.
    """
    return _attend(products, context, scale, q, k, v, segments, w)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(
    products: Products,
    context: Context,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
    w: Weight,
) -> Array:
    return _attend_forward(products, context, scale, q, k, v, segments, w)[0]


def _attend_forward(products, context, scale, q, k, v, segments, w):
    y, log_z = mla_attention.forward(q, k, v, scale, segments)
    y = context.by_tokens(y)
    rows = y.reshape(-1, y.shape[2] * y.shape[3])
    projected = products.multiply(quantize.quantize(rows, scale=power_of_two), w.blocks.mT)
    packed, log_z = keep((quantize.pack(rows), log_z), "attention")
    return projected.reshape(*y.shape[:2], -1), (q, k, v, segments, packed, log_z, w.blocks)


def _attend_backward(products, context, scale, saved, g):
    q, k, v, segments, packed, log_z, blocks = saved
    rows, (grows, gcolumns) = quantize.unpack(*packed), products.gradient(_rows(g), exact)
    dy = products.multiply(grows, blocks)
    dw = products.weight_gradient(quantize.transposed(rows, scale=power_of_two), gcolumns)
    y, dy = (context.by_heads(a.reshape(*g.shape[:2], -1, v.shape[-1])) for a in (rows, dy))
    gradients = mla_attention.backward(q, k, v, scale, segments, y, log_z, dy)
    return *gradients, None, _gradient(dw)


_attend.defvjp(_attend_forward, _attend_backward)


def _gradient(dw: Float32[Array, "*g I O"]) -> Weight:
    """The cotangent of a weight: what it was quantised to has none."""
    return Weight(dw, cast(Scaled, None))


def _kept(x: Scaled, name: str) -> Scaled:
    """Marks values as bits: JAX rounds floating-point ones that it keeps, and takes E4M3 for a type with
    infinities.

    (Seen in jax 0.10 to 0.12: what is above 240 becomes NaN.)
    """
    bits = keep(jax.lax.bitcast_convert_type(x.values, jnp.uint8), name)
    return Scaled(jax.lax.bitcast_convert_type(bits, E4M3), keep(x.scales, name), x.tile)


def _rows(x: Float[Array, "*t I"]) -> Float[Array, "T I"]:
    return x.reshape(-1, x.shape[-1])
