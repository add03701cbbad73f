"""Attention in Pallas for TPUs, over pairs of a block of queries and a block of keys that it sees part of.

Which pairs those are depends on where documents start, so they are a table, made before the kernel and read
ahead of it: a pair that no query sees costs nothing. Scores are held as [keys, queries]. Then what belongs to
a query (its maximum, its sum, where its document starts) is a row, which is how it lies in memory and which
every score below it can be combined with without moving between lanes; and gradients of keys and values need
no transposed scores.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels.mla_attention import tuning
from pallas_kernels.mla_attention.reference import first_seen
from pallas_kernels.mla_attention.tuning import Blocks
from pallas_kernels.support import cost, out_like

HIDDEN = -1e30  # a score, instead of -inf, whose difference with itself is not a number
NEVER = 2**30  # where the document of a position past the end starts: it sees nothing

# A pair of blocks in one number: flags, then the block of keys, then that of queries.
MASKED, OPENS, CLOSES, IDLE = 1, 2, 4, 8
KEY_SHIFT, QUERY_SHIFT = 4, 17

SUM_LAST, SUM_FIRST, SUM_INNER = ((1,), (1,)), ((0,), (0,)), ((1,), (0,))


@functools.partial(jax.jit, static_argnames=("scale", "blocks", "interpret"))
def forward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
    *,
    blocks: Blocks = tuning.TPU_FORWARD,
    interpret=False,
) -> tuple[Float[Array, "B S H V"], Float32[Array, "B H S"]]:
    """The values of `reference.forward`, but for the weights, which are rounded to the type of v."""
    walk = _Walk.by_query(segments, q.shape[2], _clip(blocks, q.shape[1]))
    row = pltpu.VMEM((1, walk.blocks.queries), jnp.float32)
    y, log_z = walk.run(
        _forward,
        scale,
        [(_by_head(q), walk.queries), (_by_head(k), walk.keys), (_by_head(v), walk.keys)],
        [(v.shape[3], v.dtype, walk.queries), (None, jnp.float32, walk.row)],
        [row, row, pltpu.VMEM((v.shape[3], walk.blocks.queries), jnp.float32)],
        q.shape[3] + v.shape[3],
        interpret,
    )
    return _by_head(y), log_z[:, :, 0]


@functools.partial(jax.jit, static_argnames=("scale", "for_queries", "for_keys", "interpret"))
def backward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
    y: Float[Array, "B S H V"],
    log_z: Float32[Array, "B H S"],
    g: Float[Array, "B S H V"],
    *,
    for_queries: Blocks = tuning.TPU_QUERY_GRADIENT,
    for_keys: Blocks = tuning.TPU_KEY_GRADIENT,
    interpret=False,
) -> tuple[Float[Array, "B S H X"], Float[Array, "B S H X"], Float[Array, "B S H V"]]:
    """The cotangents of `reference.backward`, but for weights and theirs, which are rounded to the inputs'
    type.

    Two kernels, each of which computes the weights: in one a sum over keys stays while keys pass by, in the
    other sums over queries stay.
    """
    (_, length, heads, width), value_width = q.shape, v.shape[3]
    inner = jnp.einsum("bshv,bshv->bhs", y.astype(jnp.float32), g.astype(jnp.float32), precision="highest")

    def operands(walk):
        by_query = [(_by_head(q), walk.queries), (_by_head(g), walk.queries)]
        by_key = [(_by_head(k), walk.keys), (_by_head(v), walk.keys)]
        return by_query + by_key + [(walk.pad(log_z), walk.row), (walk.pad(inner), walk.row)]

    walk = _Walk.by_query(segments, heads, _clip(for_queries, length))
    sums = [pltpu.VMEM((width, walk.blocks.queries), jnp.float32)]
    outputs = [(width, q.dtype, walk.queries)]
    products = 2 * width + value_width
    (dq,) = walk.run(_query_gradient, scale, operands(walk), outputs, sums, products, interpret)

    walk = _Walk.by_key(segments, heads, _clip(for_keys, length))
    sums = [pltpu.VMEM((walk.blocks.keys, w), jnp.float32) for w in (width, value_width)]
    outputs = [(width, k.dtype, walk.keys), (value_width, v.dtype, walk.keys)]
    products += value_width
    dk, dv = walk.run(_key_gradient, scale, operands(walk), outputs, sums, products, interpret)
    return _by_head(dq), _by_head(dk), _by_head(dv)


def _by_head(x: Float[Array, "B M N W"]) -> Float[Array, "B N M W"]:
    """From [B, S, H, W] to [B, H, S, W] and back: a block is positions of one head."""
    return jnp.swapaxes(x, 1, 2)


def _clip(blocks: Blocks, length: int) -> Blocks:
    """Blocks no longer than a row needs, in the unit of lanes."""
    most = pl.cdiv(length, 128) * 128
    return Blocks(min(blocks.queries, most), min(blocks.keys, most))


@dataclass(frozen=True)
class _Walk:
    """The order in which a kernel meets pairs of blocks, and what of each array a pair needs."""

    pairs: Int32[Array, " BT"]
    steps: Int32[Array, ""]  # of the row with most pairs; the others idle at their end
    first: Int32[Array, "B 1 1 P"]
    heads: int
    length: int
    blocks: Blocks

    @classmethod
    def by_query(cls, segments: Int[Array, "B S"], heads: int, blocks: Blocks) -> "_Walk":
        """All keys of a block of queries, then the next."""
        query, key = _causal_pairs(segments.shape[1], blocks)
        return cls._in_order(np.lexsort((key, query)), _query, segments, heads, blocks)

    @classmethod
    def by_key(cls, segments: Int[Array, "B S"], heads: int, blocks: Blocks) -> "_Walk":
        """All queries of a block of keys, then the next."""
        query, key = _causal_pairs(segments.shape[1], blocks)
        return cls._in_order(np.lexsort((query, key)), _key, segments, heads, blocks)

    @classmethod
    def _in_order(cls, order: np.ndarray, owner: Callable, segments, heads: int, blocks: Blocks) -> "_Walk":
        batch, length = segments.shape
        query, key = (block[None, order] for block in _causal_pairs(length, blocks))
        query_start, key_start = query * blocks.queries, key * blocks.keys
        query_last, key_last = query_start + blocks.queries - 1, key_start + blocks.keys - 1
        first = first_seen(segments)

        seen = first[:, query_start[0]] <= key_last
        whole = (first[:, np.minimum(query_last[0], length - 1)] <= key_start) & (key_last <= query_start)
        whole &= query_last < length
        codes = (query << QUERY_SHIFT) | (key << KEY_SHIFT) | jnp.where(whole, 0, MASKED)
        # Past its last pair a row stays at it, so that nothing is fetched or written.
        pairs = jnp.broadcast_to((codes[:, -1:] & ~MASKED) | IDLE, codes.shape)
        places = jnp.where(seen, jnp.cumsum(seen, axis=1) - 1, len(order))
        pairs = pairs.at[jnp.arange(batch)[:, None], places].set(codes, mode="drop")

        changes = jnp.diff(owner(pairs), axis=1) != 0
        ends = pairs[:, 1:] & IDLE != 0
        edge = jnp.ones((batch, 1), bool)
        opens = jnp.concatenate([edge, changes], axis=1)
        closes = jnp.concatenate([changes | ends, edge], axis=1) & (pairs & IDLE == 0)
        pairs |= OPENS * opens + CLOSES * closes

        first = jnp.pad(first, ((0, 0), (0, _padding(length, blocks))), constant_values=NEVER)
        steps = jnp.max(jnp.sum(seen, axis=1, dtype=jnp.int32))
        return cls(pairs.reshape(-1), steps, first[:, None, None], heads, length, blocks)

    def queries(self, width: int) -> pl.BlockSpec:
        """A block of queries, or of what has their shape but for the width."""
        return self._spec(self.blocks.queries, width, lambda pair: (_query(pair), 0))

    def keys(self, width: int) -> pl.BlockSpec:
        """A block of keys, or of what has their shape but for the width."""
        return self._spec(self.blocks.keys, width, lambda pair: (_key(pair), 0))

    def row(self, _: int | None) -> pl.BlockSpec:
        """One number for each query of a block."""
        return self._spec(1, self.blocks.queries, lambda pair: (0, _query(pair)))

    def pad(self, x: Float32[Array, "B H S"]) -> Float32[Array, "B H 1 P"]:
        """The numbers of queries as a row, with zeros where a block reaches past the end."""
        return jnp.pad(x, ((0, 0), (0, 0), (0, _padding(self.length, self.blocks))))[:, :, None]

    def run(
        self,
        body: Callable,
        scale: float,
        inputs: Sequence,
        outputs: Sequence,
        scratch: Sequence,
        products: int,
        interpret,
    ):
        """Runs `body`, which makes of references what to do before, with and after the pairs of one block.

        Args:
            body: takes the scale, and references to inputs, outputs and scratch.
            inputs: pairs of an array and the method that gives its blocks.
            outputs: width (None for one number a query), type, and method.
            scratch: what is kept between pairs.
            products: multiplications for a pair of one query and one key.
            interpret: as `pallas_call` takes it.
        """
        arrays = [x for x, _ in inputs]
        batch = arrays[0].shape[0]
        varying = (*arrays, self.pairs)

        def shape(width, dtype, _):
            sizes = (1, self.length) if width is None else (self.length, width)
            return out_like((batch, self.heads, *sizes), dtype, *varying)

        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, self.heads, self.steps),
            in_specs=[self._document(), *(spec(x.shape[3]) for x, spec in inputs)],
            out_specs=[spec(width) for width, _, spec in outputs],
            scratch_shapes=list(scratch),
        )
        made = [shape(*output) for output in outputs]
        flops = batch * self.heads * self.length * (self.length + 1) * products  # half the pairs are visible
        return pl.pallas_call(
            functools.partial(_kernel, functools.partial(body, scale), self._most, self.length, self.blocks),
            grid_spec=grid,
            out_shape=made,
            cost_estimate=cost(flops, arrays, *made),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name="mla_attention" + body.__name__,
            interpret=interpret,
        )(self.pairs, self.first, *arrays)

    @property
    def _most(self) -> int:
        return self.pairs.shape[0] // self.first.shape[0]

    def _spec(self, rows: int, columns: int, place: Callable) -> pl.BlockSpec:
        most = self._most
        return pl.BlockSpec(
            (None, None, rows, columns), lambda b, h, t, pairs: (b, h, *place(pairs[b * most + t]))
        )

    def _document(self) -> pl.BlockSpec:
        most = self._most
        where = lambda b, h, t, pairs: (b, 0, 0, _query(pairs[b * most + t]))  # noqa: E731
        return pl.BlockSpec((None, None, 1, self.blocks.queries), where)


def _causal_pairs(length: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Every block of queries with every block of keys that does not start after it ends."""
    query, key = np.indices((pl.cdiv(length, blocks.queries), pl.cdiv(length, blocks.keys)), dtype=np.int32)
    causal = key * blocks.keys < (query + 1) * blocks.queries
    return query[causal], key[causal]


def _padding(length: int, blocks: Blocks) -> int:
    return -length % blocks.queries


def _query(pair: Int32[Array, ""]) -> Int32[Array, ""]:
    return pair >> QUERY_SHIFT


def _key(pair: Int32[Array, ""]) -> Int32[Array, ""]:
    return (pair >> KEY_SHIFT) & (2 ** (QUERY_SHIFT - KEY_SHIFT) - 1)


def _kernel(body: Callable, most: int, length: int, blocks: Blocks, pairs_ref, first_ref, *refs):
    pair = pairs_ref[pl.program_id(0) * most + pl.program_id(2)]
    before, step, after = body(*refs)
    pl.when(pair & OPENS != 0)(before)
    pl.when(pair & (MASKED | IDLE) == 0)(lambda: step(_Whole()))
    pl.when(pair & MASKED != 0)(lambda: step(_Part(pair, first_ref, length, blocks)))
    pl.when(pair & CLOSES != 0)(after)


class _Whole:
    """A pair of blocks where every query sees every key."""

    def queries(self, ref):
        """What a block of queries holds."""
        return ref[...]

    keys = queries

    def visible(self, x: Float32[Array, "keys queries"], otherwise: float) -> Float32[Array, "keys queries"]:
        """`x` where the query sees the key."""
        return x


@dataclass(frozen=True)
class _Part(_Whole):
    """A pair where some queries do not see some keys, or where rows past the end hold anything at all."""

    pair: Int32[Array, ""]
    first_ref: Any
    length: int
    blocks: Blocks

    def queries(self, ref):
        return self._before_end(ref[...], _query(self.pair) * self.blocks.queries)

    def keys(self, ref):
        return self._before_end(ref[...], _key(self.pair) * self.blocks.keys)

    def visible(self, x, otherwise):
        key = _key(self.pair) * self.blocks.keys + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        query = _query(self.pair) * self.blocks.queries + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where((self.first_ref[...] <= key) & (key <= query), x, otherwise)

    def _before_end(self, x: Array, start) -> Array:
        """Zeros past the end: a product of zero with what lies there might not be a number."""
        if self.length % x.shape[0] == 0:
            return x
        position = start + jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        return jnp.where(position < self.length, x, jnp.zeros((), x.dtype))


def _forward(scale: float, q_ref, k_ref, v_ref, y_ref, log_z_ref, highest_ref, z_ref, sum_ref):
    def before():
        highest_ref[...] = jnp.full_like(highest_ref, HIDDEN)
        z_ref[...] = jnp.zeros_like(z_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def step(tile):
        scores = tile.visible(_dot(tile.keys(k_ref), tile.queries(q_ref), SUM_LAST) * scale, HIDDEN)
        highest = jnp.maximum(highest_ref[...], jnp.max(scores, axis=0, keepdims=True))
        # A query that has seen no key yet has weights of 1; the first key that it sees makes this factor 0.
        rescale = jnp.exp(highest_ref[...] - highest)
        weights = jnp.exp(scores - highest)
        z_ref[...] = z_ref[...] * rescale + jnp.sum(weights, axis=0, keepdims=True)
        sum_ref[...] = sum_ref[...] * rescale + _dot(tile.keys(v_ref), weights.astype(v_ref.dtype), SUM_FIRST)
        highest_ref[...] = highest

    def after():
        y_ref[...] = (sum_ref[...] / z_ref[...]).T.astype(y_ref.dtype)
        log_z_ref[...] = highest_ref[...] + jnp.log(z_ref[...])

    return before, step, after


def _query_gradient(scale: float, q_ref, g_ref, k_ref, v_ref, log_z_ref, inner_ref, dq_ref, sum_ref):
    def before():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def step(tile):
        k = tile.keys(k_ref)
        weights = _weights(scale, tile, k, q_ref, log_z_ref)
        dscores = weights * (_dot(tile.keys(v_ref), tile.queries(g_ref), SUM_LAST) - inner_ref[...])
        sum_ref[...] += _dot(k, dscores.astype(k.dtype), SUM_FIRST)

    def after():
        dq_ref[...] = (sum_ref[...] * scale).T.astype(dq_ref.dtype)

    return before, step, after


def _key_gradient(
    scale: float, q_ref, g_ref, k_ref, v_ref, log_z_ref, inner_ref, dk_ref, dv_ref, k_sum_ref, v_sum_ref
):
    def before():
        k_sum_ref[...] = jnp.zeros_like(k_sum_ref)
        v_sum_ref[...] = jnp.zeros_like(v_sum_ref)

    def step(tile):
        g = tile.queries(g_ref)
        weights = _weights(scale, tile, tile.keys(k_ref), q_ref, log_z_ref)
        v_sum_ref[...] += _dot(weights.astype(g.dtype), g, SUM_INNER)
        dscores = weights * (_dot(tile.keys(v_ref), g, SUM_LAST) - inner_ref[...])
        k_sum_ref[...] += _dot(dscores.astype(q_ref.dtype), tile.queries(q_ref), SUM_INNER)

    def after():
        dk_ref[...] = (k_sum_ref[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = v_sum_ref[...].astype(dv_ref.dtype)

    return before, step, after


def _weights(scale: float, tile, k, q_ref, log_z_ref) -> Float32[Array, "keys queries"]:
    scores = _dot(k, tile.queries(q_ref), SUM_LAST) * scale
    return tile.visible(jnp.exp(scores - log_z_ref[...]), 0.0)


def _dot(a: Array, b: Array, summed) -> Float32[Array, "m n"]:
    """Products of FP32 need asking for: the matrix unit takes BF16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, (summed, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
