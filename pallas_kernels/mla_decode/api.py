"""Attention over cached latents on the platform at hand."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.mla_decode import gpu, reference, tpu
from pallas_kernels.support import on_platform

merge = reference.merge


def decode(
    q: Float[Array, "B Q H W"],
    cache: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """Softmax attention of the Q newest tokens over a sequence's cached tokens, themselves among them.

    What is not finite in one of the Q newest tokens may reach the results of all of them.

    Args:
        q: absorbed queries, with a product with each of the W numbers of a cached token.
        cache: tokens, each a latent of C numbers and a shared key of W - C. From `lengths` on it may hold
            anything.
        lengths: tokens, the Q newest included. It may be negative or more than S, as it is where it counts
            from the start of one device's part of the tokens.
        width: [C] of a token's first numbers, which are its value as well.

    Returns:
        The sum of values, and the logarithm of the sum of exponentials of scaled scores: zeros and -inf for
        a query that sees no token. `merge` joins those of several sets of tokens.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check(q, cache, lengths, width)
    if cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"Queries of {q.shape[0]} sequences do not fit a cache of {cache.shape[0]}: give one for each."
        )
    options = {"scale": scale, "width": width}
    return on_platform(
        *(q, cache, lengths),
        default=partial(reference.decode, **options),
        tpu=partial(tpu.decode, **options),
        hopper=partial(gpu.decode, **options) if gpu.serves(q, cache, width) else None,
    )


def decode_paged(
    q: Float[Array, "B Q H W"],
    pages: Float[Array, "P page W"],
    table: Int32[Array, "B most"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """`decode` of sequences whose tokens lie in pages.

    Args:
        q, lengths, width: as for `decode`.
        pages: of tokens, in any order.
        table: the pages of each sequence in the order of its tokens; past its length it may hold anything.

    Raises:
        ValueError: if shapes or types do not fit.
    """
    _check(q, pages, lengths, width)
    if table.shape[0] != q.shape[0] or table.dtype != jnp.int32:
        raise ValueError(
            f"A table of {table.dtype} and shape {table.shape} does not fit {q.shape[0]} sequences: give "
            "int32 page numbers, one row for each."
        )
    options = {"scale": scale, "width": width}
    return on_platform(
        *(q, pages, table, lengths),
        default=partial(reference.decode_paged, **options),
        tpu=partial(tpu.decode_paged, **options),
        hopper=partial(gpu.decode_paged, **options) if gpu.serves(q, pages, width) else None,
    )


def _check(q: Array, tokens: Array, lengths: Array, width: int) -> None:
    if q.shape[3] != tokens.shape[2] or not 0 < width <= q.shape[3]:
        raise ValueError(
            f"Queries of {q.shape[3]} numbers, tokens of {tokens.shape[2]} and values of {width} do not "
            "fit: the first two need one width, and a value is the first part of a token."
        )
    if q.dtype != tokens.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"Queries in {q.dtype} and tokens in {tokens.dtype} are not served: cast both to bfloat16 or "
            "both to float32."
        )
    if lengths.shape != q.shape[:1] or lengths.dtype != jnp.int32:
        raise ValueError(
            f"Lengths of {lengths.dtype} and shape {lengths.shape} do not fit {q.shape[0]} sequences: give "
            "an int32 for each."
        )
