"""Attention in Pallas for Hopper: two warpgroups compute, each for 64 queries of a head, and a third copies.

A program takes 128 queries and the blocks of 128 keys that they see. Which those are, and which of them need
no mask, depends on where documents start, so it is a table, made before the kernel.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import hopper
from pallas_kernels.mla_attention.reference import first_seen
from pallas_kernels.support import out_like

BLOCK = 128  # keys that are copied at a time, and queries of a program
ROWS = BLOCK // 2  # queries of each computing warpgroup
LINE = 64  # BF16 numbers in the 128 bytes of a swizzled line
STAGES = 2  # blocks of keys and values in shared memory: a third does not fit
LOWEST = -1e30  # a maximum before any score: its difference with -inf is a number
LOG2_E = math.log2(math.e)


def serves(q: Array, v: Array) -> bool:
    """Whether rows are whole blocks, in BF16, and heads of the widths that registers were counted for."""
    return q.dtype == jnp.bfloat16 and q.shape[1] % BLOCK == 0 and (q.shape[3], v.shape[3]) == (192, 128)


@partial(jax.jit, static_argnames=("scale", "interpret"))
def forward(
    q: Float[Array, "B S H X"],
    k: Float[Array, "B S H X"],
    v: Float[Array, "B S H V"],
    scale: float,
    segments: Int[Array, "B S"],
    *,
    interpret=None,
) -> tuple[Float[Array, "B S H V"], Float32[Array, "B H S"]]:
    """The values of `reference.forward`, of operands that are served, but for weights, rounded to BF16."""
    batch, length, heads, _ = q.shape
    first = first_seen(segments)
    operands = (q, k, v, first, _bounds(first))
    return plgpu.kernel(
        partial(_kernel, scale=scale, staged=0 if interpret is None else 2),
        out_type=(
            out_like(v.shape, v.dtype, *operands),
            out_like((batch, heads, length), jnp.float32, *operands),
        ),
        grid=(length // BLOCK, heads, batch),
        grid_names=("block", "head", "row"),
        num_threads=3,
        thread_name="wg",
        compiler_params=hopper.compiler_params(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)


def _bounds(first: Int[Array, "B S"]) -> Int32[Array, " N"]:
    """For each block of queries, how many earlier blocks of keys it sees, and how many of those whole.

    Counts, because loops that start at a number as it was read do not trace in a checked `shard_map`.
    """
    block = jnp.arange(first.shape[1] // BLOCK)[None]
    seen = block - first[:, ::BLOCK] // BLOCK
    whole = jnp.maximum(block - pl.cdiv(first[:, BLOCK - 1 :: BLOCK], BLOCK), 0)
    return jnp.stack([seen, whole], axis=-1).astype(jnp.int32).reshape(-1)


class _Buffers(NamedTuple):
    """What is in shared memory; the output takes the place of queries, which nobody reads then."""

    q: Any
    k: Any
    v: Any
    first: Any
    log_z: Any
    opened: Any
    filled_k: Any
    filled_v: Any
    emptied_k: Any
    emptied_v: Any
    weights: Any  # None where wgmma takes them from registers, which jax cannot interpret

    @classmethod
    def allocate(cls, width: int, value_width: int, dtype, staged: int) -> "_Buffers":
        tile = partial(plgpu.SMEM, dtype=dtype, transforms=hopper.swizzled(LINE, dtype))
        stages = partial(plgpu.Barrier, num_barriers=STAGES)
        return cls(
            tile((2, width // LINE, ROWS, LINE)),
            tile((STAGES, BLOCK, width)),
            tile((STAGES, BLOCK, value_width)),
            plgpu.SMEM((2, ROWS), jnp.int32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=width // LINE + 1, num_barriers=2),
            stages(),
            stages(),
            stages(num_arrivals=2),
            stages(num_arrivals=2),
            tile((staged, ROWS, BLOCK)) if staged else None,
        )


def _kernel(q, k, v, first, bounds, y, log_z, *, scale, staged):
    block, row = lax.axis_index("block"), lax.axis_index("row")
    place = 2 * (row * lax.axis_size("block") + block)
    opening, whole = block - bounds[place], block - bounds[place + 1]

    buffers = _Buffers.allocate(q.shape[3], v.shape[3], q.dtype, staged)

    @partial(pl.run_scoped, buffers=buffers, collective_axes="wg")
    def _(buffers):
        lax.cond(
            lax.axis_index("wg") == 2,
            lambda: _copy(k, v, opening, block + 1, buffers),
            lambda: _attend(q, first, y, log_z, (opening, whole, block), buffers, scale * LOG2_E),
        )


def _copy(k, v, opening, end, buffers: _Buffers) -> None:
    """The third warpgroup: fills the stages in turn, as soon as each is empty."""
    plgpu.set_max_registers(40, action="decrease")
    row, head = lax.axis_index("row"), lax.axis_index("head")

    @pl.loop(0, end - opening)
    def _(step):
        window = row, pl.ds((opening + step) * BLOCK, BLOCK), head
        for source, buffer, filled, emptied in (
            (k, buffers.k, buffers.filled_k, buffers.emptied_k),
            (v, buffers.v, buffers.filled_v, buffers.emptied_v),
        ):
            slot = hopper.emptied_slot(emptied, step, STAGES)
            plgpu.copy_gmem_to_smem(source.at[window], buffer.at[slot], filled.at[slot])

    for emptied in (buffers.emptied_k, buffers.emptied_v):
        hopper.drain(emptied, end - opening, STAGES)


def _attend(q, first, y, log_z, bounds, buffers: _Buffers, scale: float) -> None:
    """The first two warpgroups, each with half the queries."""
    plgpu.set_max_registers(232, action="increase")
    wg, row, head = (lax.axis_index(name) for name in ("wg", "row", "head"))
    opening, whole, block = bounds
    start = block * BLOCK + wg * ROWS
    mine = pl.ds(start, ROWS)
    for i in range(q.shape[3] // LINE):
        window = row, mine, head, pl.ds(i * LINE, LINE)
        plgpu.copy_gmem_to_smem(q.at[window], buffers.q.at[wg, i], buffers.opened.at[wg])
    plgpu.copy_gmem_to_smem(first.at[row, mine], buffers.first.at[wg], buffers.opened.at[wg])
    plgpu.barrier_wait(buffers.opened.at[wg])

    def step(hide):
        return lambda j, sums: _step(buffers, j, lax.rem(j - opening, STAGES), sums, scale, hide)

    hide = partial(_hide, hopper.load(buffers.first.at[wg], hopper.ROWS), start)
    filled = lambda value, *shape: jnp.full(shape, value, jnp.float32)  # noqa: E731
    sums = (
        plgpu.layout_cast(filled(0, ROWS, y.shape[3]), plgpu.Layout.WGMMA),
        plgpu.layout_cast(filled(LOWEST, ROWS), hopper.ROWS),
        plgpu.layout_cast(filled(0, ROWS), hopper.ROWS),
    )
    sums = lax.fori_loop(opening, whole, step(hide), sums)
    sums = lax.fori_loop(whole, block, step(lambda j, scores: scores), sums)
    total, highest, z = step(hide)(block, sums)

    total = (total / lax.broadcast_in_dim(z, total.shape, [0])).astype(y.dtype)
    for i in range(y.shape[3] // LINE):
        buffers.q[wg, i] = total[:, i * LINE : (i + 1) * LINE]
    buffers.log_z[wg] = highest / LOG2_E + jnp.log(z)
    plgpu.commit_smem()
    for i in range(y.shape[3] // LINE):
        plgpu.copy_smem_to_gmem(buffers.q.at[wg, i], y.at[row, mine, head, pl.ds(i * LINE, LINE)])
    plgpu.copy_smem_to_gmem(buffers.log_z.at[wg], log_z.at[row, head, mine])
    plgpu.wait_smem_to_gmem(0)


def _hide(first, start, j, scores):
    """Scores of keys after a query or before its document become -inf."""
    iota = partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    key = iota(1) + j * BLOCK
    seen = (key <= iota(0) + start) & (key >= lax.broadcast_in_dim(first, scores.shape, [0]))
    return jnp.where(seen, scores, -jnp.inf)


def _step(buffers: _Buffers, j, slot, sums, scale: float, hide) -> tuple:
    """Adds a block of keys to sums of weighted values and of weights, both relative to the maximum so far."""
    total, highest, z = sums
    queries = buffers.q.at[lax.axis_index("wg")]

    def products(part):
        for i in range(queries.shape[0]):
            plgpu.wgmma(part, queries.at[i], buffers.k.at[slot, :, pl.ds(i * LINE, LINE)].T)
        return part[...]

    plgpu.barrier_wait(buffers.filled_k.at[slot])
    scores = pl.run_scoped(products, plgpu.ACC((ROWS, BLOCK), jnp.float32))
    plgpu.barrier_arrive(buffers.emptied_k.at[slot])
    scores = hide(j, scores * scale)
    raised = jnp.maximum(highest, scores.max(axis=1))
    weights = jnp.exp2(scores - lax.broadcast_in_dim(raised, scores.shape, [0]))
    shrink = jnp.exp2(highest - raised)
    z = z * shrink + weights.sum(axis=1)
    buffer = buffers.weights and buffers.weights.at[lax.axis_index("wg")]
    weights = hopper.rounded(weights, buffers.v.dtype, buffer)
    total = total * lax.broadcast_in_dim(shrink, total.shape, [0])
    plgpu.barrier_wait(buffers.filled_v.at[slot])
    (total,) = hopper.add(
        (total,), lambda sums: plgpu.wgmma(sums, weights, buffers.v.at[slot]), buffer=buffer
    )
    plgpu.barrier_arrive(buffers.emptied_v.at[slot])
    return total, raised, z
