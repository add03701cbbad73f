"""Attention over cached latents in Pallas for TPUs: one step for each block of tokens that is in use.

Sequences differ in length, so the steps are a list, made before the kernel and read ahead of it: one sequence
follows another without a pause, and blocks past its length cost nothing. Scores are held as [rows, tokens],
a row for each new token and head: then neither product needs a transposed block of the cache.

The list is walked by one core. (Where a device has two, as v5p does, the other one idles.)
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.mla_decode import tuning
from pallas_kernels.mla_decode.reference import LOWEST
from pallas_kernels.support import out_like

LANES = 128
SUM_LAST, SUM_INNER = ((1,), (1,)), ((1,), (0,))


@partial(jax.jit, static_argnames=("scale", "width", "tokens", "interpret"))
def decode(
    q: Float[Array, "B Q H W"],
    cache: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
    tokens: int = tuning.TPU_TOKENS,
    interpret=False,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """The values of `reference.decode`, but for the weights, which are rounded to the type of the cache."""
    tokens = min(tokens, pl.cdiv(cache.shape[1], LANES) * LANES)
    walk = _Walk.of(lengths, cache.shape[1], tokens)
    block = pl.BlockSpec((None, tokens, cache.shape[2]), lambda s, owner, block, *_: (owner[s], block[s], 0))
    return _run(q, walk, [cache], [block], (), scale, width, interpret)


@partial(jax.jit, static_argnames=("scale", "width", "tokens", "interpret"))
def decode_paged(
    q: Float[Array, "B Q H W"],
    pages: Float[Array, "P page W"],
    table: Int32[Array, "B most"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
    tokens: int = tuning.TPU_TOKENS,
    interpret=False,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """The values of `reference.decode_paged`, rounded as those of `decode`.

    A step takes several pages, each through an operand of its own, so that all are copied ahead together.
    """
    page, most = pages.shape[1], table.shape[1]
    many = min(pl.cdiv(tokens, page), most)
    walk = _Walk.of(lengths, most * page, many * page)

    def block(i: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, page, pages.shape[2]), lambda s, *refs: (refs[3][s * many + i], 0, 0))

    numbers = _pages(walk, table, lengths, page, many)
    return _run(q, walk, [pages] * many, [block(i) for i in range(many)], (numbers,), scale, width, interpret)


def _pages(walk: "_Walk", table, lengths, page: int, many: int) -> Int32[Array, " TN"]:
    """The pages of each step. Past a sequence's end an operand stays at its page, so that none is copied."""
    place = walk.block[:, None] * many + jnp.arange(many)[None]
    used = (place * page < lengths[walk.owner][:, None]) & (place < table.shape[1])
    step = jnp.arange(len(place))[:, None]
    last = jax.lax.cummax(jnp.where(used, step, -1), axis=0)  # the step that this operand's page is from
    number = jnp.where(used, table[walk.owner[:, None], jnp.minimum(place, table.shape[1] - 1)], 0)
    number = jnp.take_along_axis(number, jnp.maximum(last, 0), axis=0)
    return number.reshape(-1)


class _Walk(NamedTuple):
    """The order in which a kernel meets blocks of tokens: those of one sequence after those of another."""

    owner: Int32[Array, " T"]
    block: Int32[Array, " T"]
    steps: Int32[Array, ""]  # of T; the rest repeat the last
    lengths: Int32[Array, " B"]
    held: int  # tokens that the cache has room for, of each sequence
    tokens: int  # of a block

    @classmethod
    def of(cls, lengths: Int32[Array, " B"], held: int, tokens: int) -> "_Walk":
        """A sequence without tokens has one step as well, which writes its result."""
        most = max(pl.cdiv(held, tokens), 1)
        blocks = jnp.clip((lengths + tokens - 1) // tokens, 1, most)
        ends = jnp.cumsum(blocks)
        step = jnp.minimum(jnp.arange(len(lengths) * most, dtype=jnp.int32), ends[-1] - 1)
        owner = jnp.searchsorted(ends, step, side="right").astype(jnp.int32)
        return cls(owner, step - (ends - blocks)[owner], ends[-1], lengths, held, tokens)


def _run(q, walk: _Walk, operands: list, blocks: list, prefetched: tuple, scale, width, interpret):
    batch, queries, heads, wide = q.shape
    rows = queries * heads
    of_owner = lambda *block: pl.BlockSpec((None, *block), lambda s, owner, *_: (owner[s], 0, 0))  # noqa: E731
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3 + len(prefetched),
        grid=(walk.steps,),
        in_specs=[of_owner(rows, wide), *blocks],
        out_specs=[of_owner(rows, width), of_owner(rows, 1)],
        scratch_shapes=[pltpu.VMEM((rows, n), jnp.float32) for n in (LANES, LANES, width)],
    )
    shapes = ((batch, rows, width), q.dtype), ((batch, rows, 1), jnp.float32)
    y, log_z = pl.pallas_call(
        partial(_kernel, walk.held, walk.tokens, heads, queries, scale, len(prefetched)),
        grid_spec=grid,
        out_shape=[out_like(*shape, q, walk.lengths, operands, prefetched) for shape in shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="mla_decode",
        interpret=interpret,
    )(walk.owner, walk.block, walk.lengths, *prefetched, q.reshape(batch, rows, wide), *operands)
    return y.reshape(batch, queries, heads, width), log_z.reshape(batch, queries, heads)


def _kernel(held, tokens, heads, queries, scale, skipped, owner_ref, block_ref, lengths_ref, *refs):
    q_ref, *tokens_refs, y_ref, log_z_ref, highest_ref, z_ref, sum_ref = refs[skipped:]
    step = pl.program_id(0)
    block, length = block_ref[step], lengths_ref[owner_ref[step]]
    state = _State(highest_ref, z_ref, sum_ref)
    start, end = block * tokens, (block + 1) * tokens
    whole = end <= jnp.minimum(length - queries + 1, held)

    @pl.when(block == 0)
    def _():
        state.reset()

    @pl.when(whole)
    def _():
        state.add(q_ref[...], _joined(tokens_refs), scale, lambda scores: scores)

    @pl.when(~whole & (start < length))
    def _():
        here = jnp.minimum(length, held) - start

        def visible(scores):
            # lax.div, because `//` of vectors cannot be lowered for a chip that is not here.
            row, token = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, i) for i in (0, 1))
            seen = jnp.minimum(length - (queries - 1 - jax.lax.div(row, heads)), held) - start
            return jnp.where(token < seen, scores, -jnp.inf)

        # A product of zero with what lies past the end might not be a number.
        cached = _joined(tokens_refs)
        present = jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0) < here
        state.add(q_ref[...], jnp.where(present, cached, jnp.zeros((), cached.dtype)), scale, visible)

    @pl.when(end >= jnp.minimum(length, held))
    def _():
        y_ref[...], log_z_ref[...] = state.result(y_ref.dtype)


def _joined(refs: list) -> Array:
    return refs[0][...] if len(refs) == 1 else jnp.concatenate([ref[...] for ref in refs])


class _State(NamedTuple):
    """What a softmax over tokens that pass by keeps of each row; the first two are the same in every lane."""

    highest: Any
    z: Any
    sum: Any

    def reset(self) -> None:
        """No token has passed yet."""
        self.highest[...] = jnp.full_like(self.highest, LOWEST)
        self.z[...] = jnp.zeros_like(self.z)
        self.sum[...] = jnp.zeros_like(self.sum)

    def add(self, q: Array, cached: Array, scale: float, visible) -> None:
        """Adds a block of tokens, of which each row sees those whose scores `visible` leaves."""
        scores = visible(_dot(q, cached, SUM_LAST) * scale)
        highest = jnp.maximum(self.highest[...], jnp.max(scores, axis=1, keepdims=True))
        rescale = jnp.exp(self.highest[...] - highest)
        weights = jnp.exp(scores - highest[:, :1])
        self.z[...] = self.z[...] * rescale + jnp.sum(weights, axis=1, keepdims=True)
        values = _dot(weights.astype(cached.dtype), cached[:, : self.sum.shape[1]], SUM_INNER)
        self.sum[...] = self.sum[...] * rescale[:, :1] + values
        self.highest[...] = highest

    def result(self, dtype) -> tuple[Array, Array]:
        """The average of values, and the logarithm of the sum of exponentials."""
        z = self.z[:, :1]
        y = self.sum[...] / jnp.where(z == 0, 1.0, z)
        return y.astype(dtype), self.highest[:, :1] + jnp.log(z)


def _dot(a: Array, b: Array, summed) -> Float32[Array, "m n"]:
    """Products of FP32 need asking for: the matrix unit takes BF16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (summed, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
