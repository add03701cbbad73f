"""Attention over cached latents in Pallas for Hopper: a program takes 64 rows (new tokens and heads) of a
sequence and a part of its tokens.

A token is key and value at once, so a block of 64 is copied once and read by four products. Two warpgroups
compute, each all scores and half the columns of the result: no registers hold the sums of all 512, and as
each goes its own way one can take exponentials while the other multiplies. The third copies.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import hopper
from pallas_kernels.mla_decode import tuning
from pallas_kernels.mla_decode.reference import LOWEST, merge
from pallas_kernels.support import out_like

ROWS = 64  # of a program
TOKENS = 64  # of a block
LINE = 64  # BF16 numbers in the 128 bytes of a swizzled line
STAGES = 2  # blocks in shared memory: a third does not fit
LOG2_E = math.log2(math.e)


def serves(q: Array, tokens: Array, width: int) -> bool:
    """Whether pages, or sequences, are whole blocks of tokens of the size that memory was counted for."""
    return q.dtype == jnp.bfloat16 and (q.shape[3], width) == (576, 512) and tokens.shape[1] % TOKENS == 0


@partial(jax.jit, static_argnames=("scale", "width", "parts", "interpret"))
def decode(
    q: Float[Array, "B Q H W"],
    cache: Float[Array, "B S W"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
    parts: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """The values of `reference.decode`, of operands that are served, but for weights, rounded to BF16."""
    batch, tokens, _ = cache.shape
    table = jnp.arange(batch, dtype=jnp.int32)[:, None]
    lengths = jnp.minimum(lengths, tokens)
    return decode_paged(q, cache, table, lengths, scale, width=width, parts=parts, interpret=interpret)


@partial(jax.jit, static_argnames=("scale", "width", "parts", "interpret"))
def decode_paged(
    q: Float[Array, "B Q H W"],
    pages: Float[Array, "P page W"],
    table: Int32[Array, "B most"],
    lengths: Int32[Array, " B"],
    scale: float,
    *,
    width: int,
    parts: int | None = None,
    interpret=None,
) -> tuple[Float[Array, "B Q H C"], Float32[Array, "B Q H"]]:
    """The values of `reference.decode_paged`, of operands that are served, but for weights, rounded to BF16.

    Args:
        parts: of each sequence's tokens, whose results are merged.
    """
    batch, queries, heads, wide = q.shape
    rows, split = queries * heads, pages.shape[1] // TOKENS
    padded = pl.cdiv(rows, ROWS) * ROWS
    rows_of = lambda x: jnp.pad(x, [(0, 0), (0, padded - rows), *[(0, 0)] * (x.ndim - 2)])  # noqa: E731
    blocks = (table[:, :, None] * split + jnp.arange(split, dtype=jnp.int32)[None, None]).reshape(-1)
    most = table.shape[1] * split
    parts = parts or tuning.hopper_parts(batch * padded // ROWS, most)
    seen = lengths[:, None] - jnp.arange(queries, dtype=jnp.int32)[None, ::-1]
    operands = (
        rows_of(q.reshape(batch, rows, wide)),
        pages.reshape(-1, TOKENS, wide),
        rows_of(jnp.repeat(seen, heads, axis=1)),
        blocks,
        _bounds(lengths, most, parts),
    )
    y, log_z = plgpu.kernel(
        partial(_kernel, most=most, scale=scale, staged=0 if interpret is None else 2),
        out_type=(
            # Parts are not rounded before they are merged.
            out_like((parts, batch, padded, width), q.dtype if parts == 1 else jnp.float32, *operands),
            out_like((parts, batch, padded), jnp.float32, *operands),
        ),
        grid=(padded // ROWS, parts, batch),
        grid_names=("group", "part", "row"),
        num_threads=3,
        thread_name="wg",
        compiler_params=hopper.compiler_params(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)
    y = y[:, :, :rows].reshape(parts, batch, queries, heads, width)
    log_z = log_z[:, :, :rows].reshape(parts, batch, queries, heads)
    y, log_z = (y[0], log_z[0]) if parts == 1 else merge(y, log_z)
    return y.astype(q.dtype), log_z


def _bounds(lengths: Int32[Array, " B"], most: int, parts: int) -> Int32[Array, " N"]:
    """For each sequence and part: the sequence's length, the part's first block and how many it has."""
    start, end = (jnp.arange(i, i + parts, dtype=jnp.int32)[None] for i in (0, 1))
    length = jnp.clip(lengths, 0, most * TOKENS)[:, None]
    used = (length + TOKENS - 1) // TOKENS
    each = (used + parts - 1) // parts
    start, end = jnp.minimum(start * each, used), jnp.minimum(end * each, used)
    return jnp.stack(jnp.broadcast_arrays(length, start, end - start), axis=-1).reshape(-1)


class _Buffers(NamedTuple):
    """What is in shared memory."""

    q: Any
    tokens: Any
    seen: Any
    log_z: Any
    opened: Any
    filled: Any
    emptied: Any
    cleared: Any
    weights: Any  # None where wgmma takes them from registers, which jax cannot interpret

    @classmethod
    def allocate(cls, wide: int, dtype, staged: int) -> "_Buffers":
        tile = partial(plgpu.SMEM, dtype=dtype, transforms=hopper.swizzled(LINE, dtype))
        return cls(
            tile((ROWS, wide)),
            tile((STAGES, TOKENS, wide)),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2),
            tile((staged, ROWS, TOKENS)) if staged else None,
        )


def _kernel(q, tokens, seen, table, bounds, y, log_z, *, most: int, scale: float, staged: int):
    row = lax.axis_index("row")
    place = 3 * (row * lax.axis_size("part") + lax.axis_index("part"))
    length, start, number = (bounds[place + i] for i in range(3))
    rows = pl.ds(lax.axis_index("group") * ROWS, ROWS)
    buffers = _Buffers.allocate(q.shape[2], q.dtype, staged)

    @partial(pl.run_scoped, buffers=buffers, collective_axes="wg")
    def _(buffers):
        lax.cond(
            lax.axis_index("wg") == 2,
            lambda: _copy(q, tokens, seen, table, rows, row * most + start, number, buffers),
            lambda: _attend(y, log_z, rows, (length, start, number), buffers, scale * LOG2_E),
        )


def _copy(q, tokens, seen, table, rows, first, number, buffers: _Buffers) -> None:
    """The third warpgroup: after the rows, fills the stages in turn, as soon as each is empty."""
    plgpu.set_max_registers(24, action="decrease")
    row = lax.axis_index("row")
    plgpu.copy_gmem_to_smem(q.at[row, rows], buffers.q, buffers.opened)
    plgpu.copy_gmem_to_smem(seen.at[row, rows], buffers.seen, buffers.opened)

    @pl.loop(0, number)
    def _(step):
        slot = hopper.emptied_slot(buffers.emptied, step, STAGES)
        block = tokens.at[table[first + step]]
        plgpu.copy_gmem_to_smem(block, buffers.tokens.at[slot], buffers.filled.at[slot])

    hopper.drain(buffers.emptied, number, STAGES)


def _attend(y, log_z, rows, bounds: tuple, buffers: _Buffers, scale: float) -> None:
    """The first two warpgroups, each with half the columns of the result."""
    plgpu.set_max_registers(240, action="increase")
    wg, part, row = (lax.axis_index(name) for name in ("wg", "part", "row"))
    length, start, number = bounds
    columns = y.shape[3] // 2
    mine = pl.ds(wg * columns, columns)
    plgpu.barrier_wait(buffers.opened)
    seen = hopper.load(buffers.seen, hopper.ROWS)

    def step(i, sums):
        slot, token = lax.rem(i, STAGES), (start + i) * TOKENS
        plgpu.barrier_wait(buffers.filled.at[slot])

        @pl.when(token + TOKENS > length)
        def _():
            _clear(buffers.tokens.at[slot], wg * columns, columns, length - token)
            plgpu.barrier_arrive(buffers.cleared)
            plgpu.barrier_wait(buffers.cleared)

        sums = _step(buffers, slot, seen - token, sums, mine, scale)
        plgpu.barrier_arrive(buffers.emptied.at[slot])
        return sums

    filled = lambda value, *shape: jnp.full(shape, value, jnp.float32)  # noqa: E731
    sums = (
        plgpu.layout_cast(filled(0, ROWS, columns), plgpu.Layout.WGMMA),
        plgpu.layout_cast(filled(LOWEST, ROWS), hopper.ROWS),
        plgpu.layout_cast(filled(0, ROWS), hopper.ROWS),
    )
    total, highest, z = lax.fori_loop(0, number, step, sums)
    some = lax.broadcast_in_dim(jnp.where(z == 0, 1.0, z), total.shape, [0])
    hopper.store(y.at[part, row, rows, mine], (total / some).astype(y.dtype))

    @pl.when(wg == 0)
    def _():
        buffers.log_z[...] = highest / LOG2_E + jnp.log(z)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffers.log_z, log_z.at[part, row, rows])
        plgpu.wait_smem_to_gmem(0)


def _clear(block, first, columns: int, used) -> None:
    """Zeros in some columns of the tokens of a block from `used` on, which may hold a NaN: weights of zero
    would not hide it."""
    for i in range(0, columns, LINE):
        piece = block.at[:, pl.ds(first + i, LINE)]
        values = hopper.load(piece, plgpu.Layout.WGMMA)
        token = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
        piece[...] = jnp.where(token < used, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _step(buffers: _Buffers, slot, seen, sums: tuple, mine, scale: float) -> tuple:
    """Adds a block of tokens, of which a row sees so many, to sums of weighted values and of weights.

    Both are relative to the maximum so far.
    """
    total, highest, z = sums
    block = buffers.tokens.at[slot]

    def product(part):
        plgpu.wgmma(part, buffers.q, block.T)
        return part[...]

    scores = pl.run_scoped(product, plgpu.ACC((ROWS, TOKENS), jnp.float32))
    token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    scores = jnp.where(token < lax.broadcast_in_dim(seen, scores.shape, [0]), scores * scale, -jnp.inf)
    raised = jnp.maximum(highest, scores.max(axis=1))
    weights = jnp.exp2(scores - lax.broadcast_in_dim(raised, scores.shape, [0]))
    shrink = jnp.exp2(highest - raised)
    z = z * shrink + weights.sum(axis=1)
    buffer = buffers.weights and buffers.weights.at[lax.axis_index("wg")]
    weights = hopper.rounded(weights, block.dtype, buffer)
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
    (total,) = hopper.add((total,), lambda sums: plgpu.wgmma(sums, weights, block.at[:, mine]), buffer=buffer)
    return total, raised, z
