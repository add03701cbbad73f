"""Kernels on Hopper whose programs stay on their multiprocessors and take tiles of a result in turn.

Two warpgroups compute, each half the rows of a tile. A third copies what they multiply, block after block,
and does not wait where a tile ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import hopper
from pallas_kernels.support import out_like

TILE_ROWS = 128  # of the result
ROWS = TILE_ROWS // 2  # of each computing warpgroup
LINE_BYTES = 128  # of a swizzled line: what a block has of each row and column
LINE = LINE_BYTES // 4  # FP32 numbers in the bytes that a copy into shared memory is aligned to
X, W = 0, 1  # what the programs of a cluster may share
_SHARED_MEMORY = 232448 - 1024  # bytes of a block of threads, less barriers


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work."""

    columns: int  # of a tile of the result
    stages: int  # blocks of the sum in shared memory
    flight: int  # blocks that a warpgroup multiplies at once: while one is added, the next is multiplied
    sharing: int = 1  # blocks of threads that read each block of one operand from memory together

    @classmethod
    def filling(cls, columns: int, flight: int, sharing: int, dtype, scales: int = LINE) -> "Tiles":
        """As many stages as shared memory holds, each with a scale for each row and so many more."""
        result = TILE_ROWS * columns * jnp.dtype(dtype).itemsize
        stage = (TILE_ROWS + columns) * LINE_BYTES + 4 * (TILE_ROWS + scales)
        return cls(columns, min(8, (_SHARED_MEMORY - result) // stage), flight, sharing)


class Place(NamedTuple):
    """A tile of the result, and the blocks that it sums."""

    row: Any
    column: Any
    first: Any
    steps: Any  # a multiple of the tiles' flight
    of_w: tuple = ()  # which matrix, where there are several
    of_out: tuple = ()

    def result(self, rows: int, start, columns: int) -> tuple:
        """The window of some of the tile's rows."""
        return *self.of_out, pl.ds(self.row * TILE_ROWS + start, rows), pl.ds(self.column * columns, columns)


class Walk(NamedTuple):
    """The tiles that programs, or clusters of programs, take in turn."""

    number: Any
    place: Callable[[Any], Place]  # of a tile of that number
    shared: int  # X or W

    def each(self, visit: Callable[[Place, Any], None]):
        """Calls visit(place, blocks copied before) for each tile of this program, and counts its blocks."""
        programs, mine = lax.axis_size("cluster"), lax.axis_index("cluster")

        def turn(t, before):
            place = self.place(mine + t * programs)
            visit(place, before)
            return before + place.steps

        turns = lax.div(self.number - mine + programs - 1, programs)
        return lax.fori_loop(0, turns, turn, jnp.int32(0))


class Job(NamedTuple):
    """What is copied and multiplied, whatever the order of tiles."""

    buffers: tuple  # of all stages, one for each operand
    windows: Callable[[Place, Any], tuple]  # of the operands, for a tile and the number of a block
    sums: Callable[["Stages", Any, Any], tuple]  # of a warpgroup: stages, blocks before, blocks to sum
    width: int  # of the pieces that sums come in, side by side


def run(
    walk: Callable[..., Walk],
    job: Job,
    operands: tuple[Array, ...],
    tables: list[Array],
    into: Array | None,
    out: tuple[tuple[int, ...], Any],
    tiles: Tiles,
    interpret,
    sms: int,
) -> Array:
    """Computes the tiles of a walk, which is made of the numbers in the tables; `out` is shape and type.

    `into` is added, and read and not overwritten: `plgpu.kernel` has no aliases.
    """
    given = (*operands, *tables, *([] if into is None else [into]))
    return plgpu.kernel(
        partial(_kernel, walk=walk, job=job, tables=len(tables), tiles=tiles),
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


class Stages(NamedTuple):
    """The operands' next blocks, taken in turn; who waits for whom is in the barriers."""

    buffers: tuple
    filled: Any
    emptied: Any

    @classmethod
    def allocate(cls, buffers: tuple, tiles: Tiles) -> "Stages":
        """The types of what is allocated."""
        barrier = plgpu.Barrier
        if tiles.sharing > 1:  # a shared block lands in every sharer, so all must have done with the last
            barrier = partial(plgpu.ClusterBarrier, collective_axes=("peer",))
        filled = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=tiles.stages)
        return cls(buffers, filled, barrier(num_arrivals=2, num_barriers=tiles.stages))

    def wait(self, step) -> Any:
        """The stage of a block, once it is there."""
        slot = lax.rem(step, self.buffers[0].shape[0])
        plgpu.barrier_wait(self.filled.at[slot])
        return slot


def _kernel(*refs, walk, job: Job, tables: int, tiles: Tiles):
    """One of the programs that stay on their multiprocessors."""
    operands, rest = refs[: len(job.buffers)], refs[len(job.buffers) :]
    *into, out = rest[tables:]
    places = walk(*rest[:tables])

    @partial(
        pl.run_scoped,
        stages=Stages.allocate(job.buffers, tiles),
        staged=plgpu.SMEM(
            (2, ROWS, tiles.columns), out.dtype, transforms=hopper.swizzled(job.width, out.dtype)
        ),
        arrived=plgpu.Barrier(num_barriers=2),
        collective_axes="wg",
    )
    def _(stages, staged, arrived):
        wg = lax.axis_index("wg")
        result = _Result(into, out, staged.at[wg], arrived.at[wg])
        lax.cond(
            wg == 2,
            lambda: _copy(places, tiles, operands, job, stages),
            lambda: _compute(places, tiles, job, stages, result),
        )


def _copy(walk: Walk, tiles: Tiles, sources: tuple, job: Job, stages: Stages) -> None:
    """The third warpgroup: fills the stages in turn, across the ends of tiles, as soon as each is empty."""
    plgpu.set_max_registers(40, action="decrease")

    def visit(place: Place, before):
        @pl.loop(0, place.steps)
        def _(step):
            slot = hopper.emptied_slot(stages.emptied, before + step, tiles.stages)
            windows = job.windows(place, place.first + step)
            for i, (source, window) in enumerate(zip(sources, windows, strict=True)):
                shared = {"collective_axes": "peer"} if i == walk.shared and tiles.sharing > 1 else {}
                buffer, filled = stages.buffers[i].at[slot], stages.filled.at[slot]
                plgpu.copy_gmem_to_smem(source.at[window], buffer, filled, **shared)

    # Sharers must not leave while blocks are under way to them.
    hopper.drain(stages.emptied, walk.each(visit), tiles.stages)


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


def _compute(walk: Walk, tiles: Tiles, job: Job, stages: Stages, result: _Result) -> None:
    """The first two warpgroups, each with half the rows of a tile."""
    plgpu.set_max_registers(232, action="increase")

    def visit(place: Place, before):
        window = place.result(ROWS, lax.axis_index("wg") * ROWS, tiles.columns)
        result.fetch(window)
        result.put(window, job.sums(stages, before, place.steps))

    walk.each(visit)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
