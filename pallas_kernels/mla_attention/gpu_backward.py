"""Gradients of attention in Pallas for Hopper: one kernel for those of queries, one for keys and values.

Both hold 128 positions of one side in shared memory, half of them for each of two computing warpgroups, and
sum over the positions of the other side, which a third warpgroup copies. Weights are computed in both; one
kernel for all would add to gradients of queries from many programs, in no order that comes again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import hopper
from pallas_kernels.mla_attention import tuning
from pallas_kernels.mla_attention.gpu import BLOCK, LINE, LOG2_E, ROWS
from pallas_kernels.mla_attention.reference import first_seen
from pallas_kernels.mla_attention.tuning import Passing
from pallas_kernels.support import out_like


@partial(jax.jit, static_argnames=("scale", "keys", "queries", "interpret"))
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
    keys: Passing = tuning.HOPPER_KEYS,
    queries: Passing = tuning.HOPPER_QUERIES,
    interpret=None,
) -> tuple[Float[Array, "B S H X"], Float[Array, "B S H X"], Float[Array, "B S H V"]]:
    """The cotangents of `reference.backward`, of operands that `gpu.serves`; weights and theirs are rounded
    to BF16."""
    inner = jnp.einsum("bshv,bshv->bhs", y.astype(jnp.float32), g.astype(jnp.float32), precision="highest")
    first = first_seen(segments)
    by_query, by_key = (q, g, log_z * LOG2_E, inner, first), (k, v)
    run = partial(_run, scale=scale, interpret=interpret)
    of_queries = _Sum(_sum_over_keys, earlier, keys)
    (dq,) = run(of_queries, by_query, by_key, counts_of_keys(first, keys.positions), (q,))
    of_keys = _Sum(_sum_over_queries, later, queries)
    dk, dv = run(of_keys, by_key, by_query, counts_of_queries(first, queries.positions), (k, v))
    return dq, dk, dv


class _Sum(NamedTuple):
    """What differs between the two kernels."""

    step: Callable  # adds what one block that passes by gives
    order: Callable  # in which blocks pass by
    passing: Passing


def _run(
    of: _Sum, kept: tuple, others: tuple, counts, like: tuple, *, scale: float, interpret
) -> list[Array]:
    """Sums over blocks of the others; results are like the first arrays that are kept."""
    batch, length, heads, _ = kept[0].shape
    operands = (*kept, *others, counts)
    sides, interpreted = (len(kept), len(others)), interpret is not None
    return plgpu.kernel(
        partial(_kernel, of=of, sides=sides, scale=scale, staged=len(like) if interpreted else 0),
        out_type=[out_like(x.shape, x.dtype, *operands) for x in like],
        grid=(length // BLOCK, heads, batch),
        grid_names=("block", "head", "row"),
        num_threads=3,
        thread_name="wg",
        compiler_params=hopper.compiler_params(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)


def counts_of_keys(first: Int[Array, "B S"], size: int) -> Int32[Array, " N"]:
    """For each 128 queries, how many earlier blocks of keys they see that need a mask, and how many others.

    Counts, because loops that start at a number as it was read do not trace in a checked `shard_map`.
    """
    start = jnp.arange(0, first.shape[1], BLOCK)[None]
    seen = start // size - first[:, ::BLOCK] // size
    whole = jnp.maximum(start // size - pl.cdiv(first[:, BLOCK - 1 :: BLOCK], size), 0)
    return _table(seen - whole, whole)


def counts_of_queries(first: Int[Array, "B S"], size: int) -> Int32[Array, " N"]:
    """For each 128 keys, how many later blocks of queries need no mask, and how many that follow need one: in
    those the document of the first key has ended."""
    start = jnp.arange(0, first.shape[1], BLOCK)[None]
    ends, own = _document_ends(first), (start + BLOCK) // size
    whole = jnp.maximum(ends[:, ::BLOCK] // size - own, 0)
    return _table(whole, pl.cdiv(ends[:, BLOCK - 1 :: BLOCK], size) - own - whole)


def _document_ends(first: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """One past the last position of each position's document."""
    length = first.shape[1]
    starts = jnp.where(first == jnp.arange(length)[None], first, length)
    following = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return lax.cummin(following, axis=1, reverse=True)


def _table(*counts) -> Int32[Array, " N"]:
    return jnp.stack(counts, axis=-1).astype(jnp.int32).reshape(-1)


def earlier(masked, whole, own: int) -> tuple:
    """How many blocks lie before a program's own positions, and blocks of keys as they pass: some that need a
    mask, some that need none, and those of its own positions, which all need one."""
    return masked + whole, ((masked, hide_unseen), (whole, show_all), (own, hide_unseen))


def later(whole, masked, own: int) -> tuple:
    """The same of blocks of queries, which begin with those of a program's own positions."""
    return 0, ((own, hide_unseen), (whole, show_all), (masked, hide_unseen))


class _Buffers(NamedTuple):
    """What is in shared memory; results take the place of what was kept, which nobody reads then."""

    kept: tuple
    others: tuple
    opened: Any
    filled: Any
    emptied: Any
    rounded: Any  # None where wgmma takes what was computed from registers, which jax cannot interpret

    @classmethod
    def allocate(cls, kept: tuple, others: tuple, passing: Passing, staged: int) -> "_Buffers":
        dtype = kept[0].dtype
        lines = hopper.swizzled(min(LINE, passing.positions), dtype)  # a product sums over whole lines

        def like(x, *shape):
            matrix = x.ndim == 4
            return plgpu.SMEM((*shape, *x.shape[3:]), x.dtype, transforms=lines if matrix else ())

        return cls(
            tuple(like(x, 2, ROWS) for x in kept),
            tuple(like(x, passing.stages, passing.positions) for x in others),
            plgpu.Barrier(num_arrivals=len(kept), num_barriers=2),
            plgpu.Barrier(num_arrivals=len(others), num_barriers=passing.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=passing.stages),
            plgpu.SMEM((2, staged, ROWS, passing.positions), dtype, transforms=lines) if staged else None,
        )


def _kernel(*refs, of: _Sum, sides: tuple[int, int], scale: float, staged: int):
    kept, others, (counts, *out) = refs[: sides[0]], refs[sides[0] : sum(sides)], refs[sum(sides) :]
    block, row = lax.axis_index("block"), lax.axis_index("row")
    place = 2 * (row * lax.axis_size("block") + block)
    own = BLOCK // of.passing.positions
    back, loops = of.order(counts[place], counts[place + 1], own)
    opening = block * own - back
    buffers = _Buffers.allocate(kept, others, of.passing, staged)

    @partial(pl.run_scoped, buffers=buffers, collective_axes="wg")
    def _(buffers):
        lax.cond(
            lax.axis_index("wg") == 2,
            lambda: _copy(others, opening, sum(count for count, _ in loops), of.passing, buffers),
            lambda: _sum(of, kept, out, opening, loops, buffers, scale),
        )


def _window(x, start, size: int) -> tuple:
    """Some positions of this program's row and head: [B, S, H, W], [B, H, S] or [B, S]."""
    row, head, positions = lax.axis_index("row"), lax.axis_index("head"), pl.ds(start, size)
    return {4: (row, positions, head), 3: (row, head, positions), 2: (row, positions)}[x.ndim]


def _copy(sources: tuple, opening, number, passing: Passing, buffers: _Buffers) -> None:
    """The third warpgroup: fills the stages in turn, as soon as each is empty."""
    plgpu.set_max_registers(24, action="decrease")

    @pl.loop(0, number)
    def _(step):
        slot = hopper.emptied_slot(buffers.emptied, step, passing.stages)
        start = (opening + step) * passing.positions
        for source, buffer in zip(sources, buffers.others, strict=True):
            window = _window(source, start, passing.positions)
            plgpu.copy_gmem_to_smem(source.at[window], buffer.at[slot], buffers.filled.at[slot])

    hopper.drain(buffers.emptied, number, passing.stages)


def _sum(of: _Sum, kept: tuple, out: list, opening, loops: tuple, buffers: _Buffers, scale: float) -> None:
    """The first two warpgroups, each with half the positions of a program."""
    plgpu.set_max_registers(240, action="increase")
    wg = lax.axis_index("wg")
    mine = lax.axis_index("block") * BLOCK + wg * ROWS
    for source, buffer in zip(kept, buffers.kept, strict=True):
        plgpu.copy_gmem_to_smem(source.at[_window(source, mine, ROWS)], buffer.at[wg], buffers.opened.at[wg])
    plgpu.barrier_wait(buffers.opened.at[wg])

    def step(hide: Callable, before, i, totals):
        at = before + i
        slot, start = lax.rem(at, of.passing.stages), (opening + at) * of.passing.positions
        plgpu.barrier_wait(buffers.filled.at[slot])
        rounded = None if buffers.rounded is None else buffers.rounded.at[wg]
        blocks = [x.at[wg] for x in buffers.kept], [x.at[slot] for x in buffers.others]
        totals = of.step(totals, *blocks, partial(hide, kept=mine, others=start), scale, rounded)
        plgpu.barrier_arrive(buffers.emptied.at[slot])
        return totals

    totals, before = tuple(_zeros(ROWS, x.shape[3]) for x in out), 0
    for count, hide in loops:
        totals = lax.fori_loop(0, count, partial(step, hide, before), totals)
        before += count
    for x, total, buffer in zip(out, totals, buffers.kept, strict=False):
        buffer[wg] = total.astype(x.dtype)
    plgpu.commit_smem()
    for x, buffer in zip(out, buffers.kept, strict=False):
        plgpu.copy_smem_to_gmem(buffer.at[wg], x.at[_window(x, mine, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _zeros(*shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def show_all(scores, first: Callable, key_axis: int, kept, others):
    """All scores, of blocks that are seen whole."""
    return scores


def hide_unseen(scores, first: Callable, key_axis: int, kept, others):
    """Scores of keys after a query or before its document become -inf."""
    queries, keys = (kept, others) if key_axis == 1 else (others, kept)
    iota = partial(plgpu.broadcasted_iota, jnp.int32, scores.shape, layout=plgpu.Layout.WGMMA)
    key = iota(key_axis) + keys
    return jnp.where((key <= iota(1 - key_axis) + queries) & (key >= first()), scores, -jnp.inf)


def _sum_over_keys(totals, queries: list, keys: list, hide: Callable, scale: float, buffer) -> tuple:
    """Adds a block of keys to gradients of queries. Both products with keys are under way at once."""
    (q, g, log_z, inner, first), (k, v) = queries, keys
    shape = q.shape[0], k.shape[0]
    spread = lambda x: lax.broadcast_in_dim(hopper.load(x, hopper.ROWS), shape, [0])  # noqa: E731

    def products(scores, dweights):
        plgpu.wgmma(scores, q, k.T)
        plgpu.wgmma(dweights, g, v.T)
        scores = plgpu.wgmma_accumulator_load(scores, wait_n=1) * (scale * LOG2_E)
        weights = jnp.exp2(hide(scores, lambda: spread(first), 1) - spread(log_z))
        return weights * (plgpu.wgmma_accumulator_load(dweights, wait_n=0) - spread(inner))

    dscores = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
    dscores = hopper.rounded(dscores * scale, k.dtype, buffer and buffer.at[0])
    return hopper.add(totals, lambda dq: plgpu.wgmma(dq, dscores, k), buffer=buffer)


def _sum_over_queries(totals, keys: list, queries: list, hide: Callable, scale: float, buffer) -> tuple:
    """Adds a block of queries to gradients of keys and values; scores are [keys, queries].

    Where what belongs to dv is added is chosen so that registers suffice.
    """
    (dk, dv), (q, g, log_z, inner, first), (k, v) = totals, queries, keys
    shape = k.shape[0], q.shape[0]
    spread = lambda x: lax.broadcast_in_dim(hopper.load(x, hopper.COLUMNS), shape, [1])  # noqa: E731

    def product(scores):
        plgpu.wgmma(scores, k, q.T)
        return scores[...]

    scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32)) * (scale * LOG2_E)
    weights = jnp.exp2(hide(scores, lambda: spread(first), 0) - spread(log_z))
    rounded = hopper.rounded(weights, g.dtype, buffer and buffer.at[0])
    products = (lambda dv: plgpu.wgmma(dv, rounded, g)), (lambda dweights: plgpu.wgmma(dweights, v, g.T))
    dv, dweights = hopper.add((dv, _zeros(*shape)), *products, buffer=buffer)
    dscores = weights * (dweights - spread(inner)) * scale
    dscores = hopper.rounded(dscores, q.dtype, buffer and buffer.at[1])
    return *hopper.add((dk,), lambda dk: plgpu.wgmma(dk, dscores, q), buffer=buffer), dv
