"""Scaled products on Hopper, whatever their tiles are of: tensor cores multiply 128 columns at a time, CUDA
cores scale and add in FP32.

The tensor cores of Hopper keep about 14 bits of a sum of FP8 products, so after every 128 columns the sum
moves to FP32 registers (arXiv:2412.19437, section 3.3.2). While one of the two computing warpgroups does that
the other keeps the tensor cores busy; a third warpgroup copies.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import hopper
from pallas_kernels.hopper_tiles import LINE, TILE_ROWS, K, Operands, Place, Tiles, Walk, piece
from pallas_kernels.scaled import E4M3
from pallas_kernels.support import out_like

ROWS = TILE_ROWS // 2  # of each computing warpgroup: 128 would leave no registers for a second sum


def run(
    walk: Callable[[Any], Walk],
    operands: Operands,
    tables: list[Array],
    into: Array | None,
    out: tuple[tuple[int, ...], Any],
    tiles: Tiles,
    scaling: Callable[[Any, int], list],
    interpret,
    sms: int,
) -> Array:
    """Multiplies the tiles of a walk, which is made of the numbers in the tables; `out` is shape and type.

    `scaling` is `by_column` or `by_pieces`, as the operands are.
    `into` is read and not overwritten: `plgpu.kernel` has no aliases.
    """
    given = (*operands, *tables, *([] if into is None else [into]))
    return plgpu.kernel(
        partial(_kernel, walk=walk, tables=len(tables), tiles=tiles, scaling=scaling),
        out_type=out_like(*out, *given),
        grid=(sms // tiles.sharing,),
        grid_names=("cluster",),
        cluster=(tiles.sharing,),
        cluster_names=("peer",),
        num_threads=3,
        thread_name="wg",
        compiler_params=hopper.compiler_params(),
        **({} if interpret is None else {"interpret": interpret}),
    )(*given)


class _Stages(NamedTuple):
    """The operands' next blocks of 128 columns, taken in turn; who waits for whom is in the barriers."""

    x: Any
    w: Any
    x_scales: Any
    w_scales: Any
    filled: Any
    emptied: Any

    @property
    def buffers(self) -> tuple:
        """What is copied into."""
        return self[:4]

    @classmethod
    def allocate(cls, tiles: Tiles, line: int) -> "_Stages":
        n = tiles.stages
        values = partial(plgpu.SMEM, dtype=E4M3, transforms=hopper.swizzled(K, E4M3))
        barrier = plgpu.Barrier
        if tiles.sharing > 1:  # a shared block lands in every sharer, so all must have done with the last
            barrier = partial(plgpu.ClusterBarrier, collective_axes=("peer",))
        return cls(
            values((n, TILE_ROWS, K)),
            values((n, tiles.columns, K)),
            plgpu.SMEM((n, TILE_ROWS), jnp.float32),
            plgpu.SMEM((n, line), jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=n),
            barrier(num_arrivals=2, num_barriers=n),
        )


def _kernel(*refs, walk, tables: int, tiles: Tiles, scaling):
    """One of the programs that stay on their multiprocessors."""
    operands, rest = refs[:4], refs[4:]
    *into, out = rest[tables:]
    width = tiles.columns if scaling is by_column else piece(tiles.columns)
    line = tiles.columns if scaling is by_column else LINE
    places = walk(*rest[:tables])

    @partial(
        pl.run_scoped,
        stages=_Stages.allocate(tiles, line),
        staged=plgpu.SMEM((2, ROWS, tiles.columns), out.dtype, transforms=hopper.swizzled(width, out.dtype)),
        arrived=plgpu.Barrier(num_barriers=2),
        collective_axes="wg",
    )
    def _(stages, staged, arrived):
        wg = lax.axis_index("wg")
        result = _Result(into, out, staged.at[wg], arrived.at[wg])
        lax.cond(
            wg == 2,
            lambda: _copy(places, tiles, operands, stages),
            lambda: _multiply(places, tiles, stages, scaling, width, result),
        )


def _copy(walk: Walk, tiles: Tiles, sources: tuple, stages: _Stages) -> None:
    """The third warpgroup: fills the stages in turn, across the ends of tiles, as soon as each is empty."""
    plgpu.set_max_registers(40, action="decrease")
    many, line = tiles.stages, stages.w_scales.shape[1]

    def visit(place: Place, before):
        rows = pl.ds(place.row * TILE_ROWS, TILE_ROWS)
        columns = pl.ds(place.column * tiles.columns, tiles.columns)

        @pl.loop(0, place.steps)
        def _(step):
            slot, block = lax.rem(before + step, many), place.first + step

            @pl.when(before + step >= many)
            def _():
                plgpu.barrier_wait(stages.emptied.at[slot])

            depth = pl.ds(block * K, K)
            windows = (
                (rows, depth),
                (*place.of_w, columns, depth),
                (block, rows),
                (*place.of_w, block, pl.ds(place.column * line, line)),
            )
            for i, (source, window) in enumerate(zip(sources, windows, strict=True)):
                shared = {"collective_axes": "peer"} if i == walk.shared and tiles.sharing > 1 else {}
                buffer, filled = stages.buffers[i].at[slot], stages.filled.at[slot]
                plgpu.copy_gmem_to_smem(source.at[window], buffer, filled, **shared)

    hopper.drain(stages.emptied, walk.each(visit), many)


class _Result(NamedTuple):
    """Where a warpgroup's part of a tile goes, and the sums that it is added to."""

    into: list
    out: Any
    staged: Any
    arrived: Any

    def fetch(self, window: tuple) -> None:
        """Starts to copy the sums into the memory that the result will be staged in."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for sums in self.into:
            plgpu.copy_gmem_to_smem(sums.at[window], self.staged, self.arrived)

    def put(self, window: tuple, total: tuple) -> None:
        """Adds the sums and starts to copy the result out."""
        for _ in self.into:
            plgpu.barrier_wait(self.arrived)
        width = total[0].shape[1]
        for i, sums in enumerate(total):
            part = self.staged.at[:, pl.ds(i * width, width)]
            if self.into:
                sums += hopper.load(part, plgpu.Layout.WGMMA)
            part[...] = sums.astype(self.out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.staged, self.out.at[window])


def _multiply(walk: Walk, tiles: Tiles, stages: _Stages, scaling, width: int, result: _Result) -> None:
    """The first two warpgroups, each with half the rows of a tile."""
    plgpu.set_max_registers(232, action="increase")
    mine = lax.axis_index("wg") * ROWS
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)

    def visit(place: Place, before):
        window = place.result(ROWS, mine, tiles.columns)
        result.fetch(window)

        def step(s, total):
            slots = [lax.rem(before + s * tiles.flight + b, tiles.stages) for b in range(tiles.flight)]
            return _step(stages, slots, pl.ds(mine, ROWS), scaling, total)

        steps = lax.div(place.steps, tiles.flight)
        result.put(window, lax.fori_loop(0, steps, step, (zeros,) * (tiles.columns // width)))

    walk.each(visit)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _step(stages: _Stages, slots: list, rows, scaling, total: tuple) -> tuple:
    """Starts the products of some blocks of K, and adds each to the total while the next are computed."""

    def start(*sums):
        if len(sums) == len(slots):
            return finish(*sums)
        slot = slots[len(sums)]
        plgpu.barrier_wait(stages.filled.at[slot])

        def product(part):
            plgpu.wgmma(part, stages.x.at[slot, rows], stages.w.at[slot].T)
            return start(*sums, part)

        return pl.run_scoped(product, plgpu.ACC((ROWS, stages.w.shape[1]), jnp.float32))

    def finish(*sums):
        added = total
        for i, (slot, part) in enumerate(zip(slots, sums, strict=True)):
            row_scales = hopper.load(stages.x_scales.at[slot, rows], hopper.ROWS)
            column_scales = scaling(stages.w_scales.at[slot], len(total))
            part = plgpu.wgmma_accumulator_load(part, wait_n=len(sums) - 1 - i)
            added = _promote(added, part, row_scales, column_scales)
            plgpu.commit_smem()  # TMA may overwrite the scales only after they are read
            plgpu.barrier_arrive(stages.emptied.at[slot])
        return added

    return start()


def by_pieces(w_scales, pieces: int) -> list:
    """The scale of each piece of a tile's columns."""
    return [w_scales[i] for i in range(pieces)]


def by_column(w_scales, pieces: int) -> list:
    """The scale of each of a tile's columns, which are one piece."""
    assert pieces == 1
    scales = hopper.load(w_scales, hopper.COLUMNS)
    return [lax.broadcast_in_dim(scales, (ROWS, *scales.shape), [1])]


def _promote(total: tuple, part, rows, columns: list) -> tuple:
    width = total[0].shape[1]
    spread = lambda scale: lax.broadcast_in_dim(scale, (ROWS, width), [0])  # noqa: E731
    added = []
    for i, (sums, scale) in enumerate(zip(total, columns, strict=True)):
        piece = part if len(total) == 1 else part[:, i * width : (i + 1) * width]
        scale = spread(rows * scale) if scale.ndim == 0 else spread(rows) * scale
        added.append(sums + piece * scale)
    return tuple(added)
