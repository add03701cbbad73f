"""The operations a model is built from. Choosing them is how precision, transport and recomputation are
chosen.

What is not here (embedding, head, router, norms) calls `jnp` directly in the model and therefore keeps its
precision whatever is chosen: the list of arXiv:2412.19437, section 3.3.1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.ops import fp8 as _fp8
from dsv3_jax.ops import held, plain, recompute
from dsv3_jax.ops.context import WHOLE, Context
from dsv3_jax.ops.dispatch import AllToAll, Dispatcher
from dsv3_jax.ops.exchange import InFp8
from dsv3_jax.ops.held import Hold
from pallas_kernels.scaled import Scaled

_DISPATCHER = AllToAll()


@dataclass(frozen=True)
class Ops:
    """One choice for every replaceable operation.

    A static argument of compiled programs, so that equal choices must be equal: the functions below give the
    same object for the same arguments.
    """

    dtype: jnp.dtype  # activations, and weights where they are multiplied; master weights are FP32
    # What products read of local weights, made once a step for all micro-batches, and the layout of that.
    prepare: Callable[[Any, Any], tuple[Any, Any]]
    # Weights, of which gradients are asked for, with what `prepare` made of them.
    attach: Callable[[Any, Any], Any]
    # Of what `prepare` made: what takes the place of the weights where they are not at hand.
    stand_in: Callable[[Any], Any]
    hold: Hold  # how weights lie in memory while text is written, so that products read them as they are
    of_blocks: Callable[[Scaled], Any]  # what products read of a weight that lies there in FP8
    matrix: Callable[[Any], Array]  # a weight that something else than these products multiplies by
    gather: Callable[[Any, Any], Any]  # assembles the weights of a layer, or one weight, by their layouts
    matmul: Callable[[Array, Any], Array]
    swiglu_matmul: Callable[[Array, Any], Array]  # of gate and up columns, and the down projection
    grouped_matmul: Callable[[Array, Any, Array], Array]
    grouped_swiglu_matmul: Callable[[Array, Array, Any, Array], Array]  # the same with a gate weight a row
    # Of queries, keys, values, scale, segments, the output projection and what brings heads to it.
    attend: Callable[..., Array]
    attend_cached: Callable[..., Array]  # of absorbed queries, cached tokens, their number, scale and width
    dispatcher: Dispatcher
    context: Context
    remat: recompute.Remat  # wraps the body of the loop over layers


@cache
def float32(
    remat: recompute.Remat = recompute.nothing,
    *,
    dispatcher: AllToAll = _DISPATCHER,
    context: Context = WHOLE,
) -> Ops:
    """Everything in FP32: the definition that the others are compared with."""
    return _without_scales(jnp.float32, 1, remat, dispatcher, context)


@cache
def bfloat16(
    remat: recompute.Remat = recompute.nothing,
    *,
    dispatcher: AllToAll = _DISPATCHER,
    context: Context = WHOLE,
) -> Ops:
    """BF16 products with FP32 accumulation over FP32 master weights."""
    return _without_scales(jnp.bfloat16, plain.ALIGNMENT, remat, dispatcher, context)


@cache
def fp8(
    remat: recompute.Remat = recompute.nothing,
    dense: _fp8.Products = _fp8.DENSE,
    experts: _fp8.Products = _fp8.EXPERTS,
    *,
    dispatcher: AllToAll = _DISPATCHER,
    context: Context = WHOLE,
) -> Ops:
    """The products of attention and feed-forward layers in FP8 with fine-grained scales, the rest in BF16.

    Tokens go to their experts in FP8, and come home in BF16.
    Other products than the report's are for studies of precision.
    """
    return Ops(
        dtype=jnp.dtype(jnp.bfloat16),
        prepare=_fp8.prepare,
        attach=_fp8.attach,
        stand_in=_fp8.stand_in,
        hold=held.in_fp8,
        of_blocks=_fp8.of_blocks,
        matrix=_fp8.matrix,
        gather=_fp8.gather,
        matmul=partial(_fp8.matmul, products=dense),
        swiglu_matmul=partial(_fp8.swiglu_matmul, products=dense),
        grouped_matmul=partial(_fp8.grouped_matmul, products=experts),
        grouped_swiglu_matmul=partial(_fp8.grouped_swiglu_matmul, products=experts),
        attend=partial(_fp8.attend, products=dense),
        attend_cached=plain.attend_cached,
        dispatcher=replace(dispatcher, alignment=plain.ALIGNMENT, out=InFp8(dispatcher.out)),
        context=context,
        remat=remat,
    )


def _without_scales(
    dtype, alignment: int, remat: recompute.Remat, dispatcher: AllToAll, context: Context
) -> Ops:
    return Ops(
        dtype=jnp.dtype(dtype),
        prepare=partial(plain.prepare, dtype=jnp.dtype(dtype)),
        attach=plain.attach,
        stand_in=plain.stand_in,
        hold=held.as_it_is,
        of_blocks=partial(held.widened, dtype=jnp.dtype(dtype)),
        matrix=plain.matrix,
        gather=partial(plain.gather, dtype=jnp.dtype(dtype)),
        matmul=plain.matmul,
        swiglu_matmul=plain.swiglu_matmul,
        grouped_matmul=partial(plain.grouped_matmul, alignment=alignment),
        grouped_swiglu_matmul=partial(plain.grouped_swiglu_matmul, alignment=alignment),
        attend=plain.attend,
        attend_cached=plain.attend_cached,
        dispatcher=replace(dispatcher, alignment=alignment),
        context=context,
        remat=remat,
    )
