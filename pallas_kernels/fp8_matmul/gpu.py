"""The scaled product on Hopper: tensor cores multiply 128 columns at a time, CUDA cores scale and add in
FP32.

The tensor cores of Hopper keep about 14 bits of a sum of FP8 products, so after every 128 columns the sum
moves to FP32 registers (arXiv:2412.19437, section 3.3.2). While one of the two computing warpgroups does that
the other keeps the tensor cores busy; a third warpgroup copies.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels import hopper
from pallas_kernels.fp8_matmul import tuning
from pallas_kernels.scaled import E4M3, Scaled
from pallas_kernels.support import out_like

K = 128  # columns between promotions, and of a scale
ROWS = tuning.HOPPER_ROWS // 2  # of each computing warpgroup
LINE = 128 // 4  # FP32 numbers in the bytes that a copy into shared memory is aligned to


def serves(x: Scaled, w: Scaled, dtype) -> bool:
    """Whether tiles are those of the report and rows of the result whole 16 bytes, which TMA needs."""
    aligned = w.shape[0] * jnp.dtype(dtype).itemsize % 16 == 0
    return aligned and x.tile[1] == K and w.tile[0] in (1, K)


@partial(jax.jit, static_argnames=("dtype", "tiles", "interpret", "sms"))
def matmul(
    x: Scaled,
    w: Scaled,
    into: Float32[Array, "M N"] | None = None,
    dtype=jnp.bfloat16,
    *,
    tiles: tuning.HopperTiles | None = None,
    interpret=None,
    sms: int = hopper.SMS,
) -> Float[Array, "M N"]:
    """The definition's product, of operands that are served.

    `into` is read and not overwritten: `plgpu.kernel` has no aliases.
    """
    (m, k), n, fine = x.shape, w.shape[0], w.tile[0] == 1
    tiles = tiles or tuning.hopper(m, n, k, w.tile[0], dtype)
    scales = _aligned(w.scales.T) if fine else _by_piece(w.scales, n, tiles.columns)
    operands = (_whole_lines(x.values), _whole_lines(w.values), _aligned(x.scales.T), scales)
    operands += () if into is None else (into,)
    return plgpu.kernel(
        partial(_kernel, tiles=tiles, scaling=_by_column if fine else _by_pieces),
        out_type=out_like((m, n), dtype, *operands),
        grid=(sms // tiles.sharing,),
        grid_names=("cluster",),
        cluster=(tiles.sharing,),
        cluster_names=("peer",),
        num_threads=3,
        thread_name="wg",
        compiler_params=hopper.compiler_params(),
        **({} if interpret is None else {"interpret": interpret}),
    )(*operands)


def _aligned(scales: Float32[Array, "KB M"]) -> Float32[Array, "KB M4"]:
    """Rows of whole 16 bytes, which TMA needs."""
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % 4)))


def _whole_lines(values: Float[Array, "R K"]) -> Float[Array, "R KP"]:
    """Columns of whole swizzled lines, as jax 0.11 wants them: a copy, where K is no multiple of 128."""
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % K)))


def _piece(columns: int) -> int:
    """The widest run of a tile's columns that no edge of a 128 x 128 scale crosses, wherever it lies."""
    return math.gcd(columns, K)


def _by_piece(scales: Float32[Array, "NB KB"], n: int, columns: int) -> Float32[Array, "KB L"]:
    """The scales that each tile of columns needs, one line of shared memory for each tile."""
    starts = jnp.arange(0, columns, _piece(columns))[None] + jnp.arange(0, n, columns)[:, None]
    blocks = jnp.minimum(starts // K, scales.shape[0] - 1)  # pieces past the last column are never stored
    lines = jnp.pad(scales.T[:, blocks], ((0, 0), (0, 0), (0, LINE - blocks.shape[1])))
    return lines.reshape(scales.shape[1], -1)


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
    def allocate(cls, tiles: tuning.HopperTiles, line: int) -> "_Stages":
        n, rows = tiles.stages, 2 * ROWS
        values = partial(plgpu.SMEM, dtype=E4M3, transforms=hopper.swizzled(K, E4M3))
        barrier = plgpu.Barrier
        if tiles.sharing > 1:  # a block of w lands in every sharer, so all must have done with the last
            barrier = partial(plgpu.ClusterBarrier, collective_axes=("peer",))
        return cls(
            values((n, rows, K)),
            values((n, tiles.columns, K)),
            plgpu.SMEM((n, rows), jnp.float32),
            plgpu.SMEM((n, line), jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=n),
            barrier(num_arrivals=2, num_barriers=n),
        )


class _Walk(NamedTuple):
    """The tiles of the result that one program, or several that share blocks of w, take in turn."""

    grid: tuple[int, int]
    steps: int  # blocks of K in each
    tiles: tuning.HopperTiles

    def each(self, visit) -> None:
        """Calls visit(rows, columns, number of blocks that were copied before) for each tile."""

        @plgpu.nd_loop((self.grid[0] * self.grid[1],), collective_axes="cluster")
        def _(turn):
            i, j = plgpu.planar_snake(turn.index[0], self.grid, 1, tuning.SNAKE)
            visit(i * self.tiles.sharing + lax.axis_index("peer"), j, turn.local_index * self.steps)

    def turns(self):
        """How many tiles this program takes."""
        programs, mine = lax.axis_size("cluster"), lax.axis_index("cluster")
        return lax.div(self.grid[0] * self.grid[1] - mine + programs - 1, programs)


def _kernel(x, w, x_scales, w_scales, *rest, tiles, scaling):
    """One of the programs that stay on their multiprocessors."""
    *into, out = rest
    width = tiles.columns if scaling is _by_column else _piece(tiles.columns)
    line = tiles.columns if scaling is _by_column else LINE
    grid = pl.cdiv(x.shape[0], 2 * ROWS * tiles.sharing), pl.cdiv(w.shape[0], tiles.columns)
    walk = _Walk(grid, pl.cdiv(pl.cdiv(x.shape[1], K), tiles.flight) * tiles.flight, tiles)

    @partial(
        pl.run_scoped,
        stages=_Stages.allocate(tiles, line),
        staged=plgpu.SMEM((2, ROWS, tiles.columns), out.dtype, transforms=hopper.swizzled(width, out.dtype)),
        arrived=plgpu.Barrier(num_barriers=2),
        collective_axes="wg",
    )
    def _(stages, staged, arrived):
        wg = lax.axis_index("wg")
        lax.cond(
            wg == 2,
            lambda: _copy(walk, (x, w, x_scales, w_scales), stages),
            lambda: _multiply(
                walk, stages, scaling, width, _Result(into, out, staged.at[wg], arrived.at[wg])
            ),
        )


def _copy(walk: _Walk, sources: tuple, stages: _Stages) -> None:
    """The third warpgroup: fills the stages in turn, across the ends of tiles, as soon as each is empty."""
    plgpu.set_max_registers(40, action="decrease")
    tiles, many = walk.tiles, walk.tiles.stages
    line = stages.w_scales.shape[1]

    def visit(i, j, before):
        rows, columns = pl.ds(i * 2 * ROWS, 2 * ROWS), pl.ds(j * tiles.columns, tiles.columns)

        @pl.loop(0, walk.steps)
        def _(step):
            slot, depth = lax.rem(before + step, many), pl.ds(step * K, K)

            @pl.when(before + step >= many)
            def _():
                plgpu.barrier_wait(stages.emptied.at[slot])

            windows = (rows, depth), (columns, depth), (step, rows), (step, pl.ds(j * line, line))
            for source, window, buffer in zip(sources, windows, stages.buffers, strict=True):
                shared = {"collective_axes": "peer"} if buffer is stages.w and tiles.sharing > 1 else {}
                plgpu.copy_gmem_to_smem(source.at[window], buffer.at[slot], stages.filled.at[slot], **shared)

    walk.each(visit)
    copied = walk.turns() * walk.steps

    # Sharers must not leave while blocks are under way to them.
    @pl.loop(jnp.maximum(copied - many, 0), copied)
    def _(step):
        plgpu.barrier_wait(stages.emptied.at[lax.rem(step, many)])


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
        for i, piece in enumerate(total):
            part = self.staged.at[:, pl.ds(i * width, width)]
            if self.into:
                piece += hopper.load(part, plgpu.Layout.WGMMA)
            part[...] = piece.astype(self.out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.staged, self.out.at[window])


def _multiply(walk: _Walk, stages: _Stages, scaling, width: int, result: _Result) -> None:
    """The first two warpgroups, each with half the rows of a tile."""
    plgpu.set_max_registers(232, action="increase")
    tiles, mine = walk.tiles, lax.axis_index("wg") * ROWS
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), jnp.float32), plgpu.Layout.WGMMA)

    def visit(i, j, before):
        window = pl.ds(i * 2 * ROWS + mine, ROWS), pl.ds(j * tiles.columns, tiles.columns)
        result.fetch(window)

        def step(s, total):
            slots = [lax.rem(before + s * tiles.flight + b, tiles.stages) for b in range(tiles.flight)]
            return _step(stages, slots, pl.ds(mine, ROWS), scaling, total)

        result.put(
            window, lax.fori_loop(0, walk.steps // tiles.flight, step, (zeros,) * (tiles.columns // width))
        )

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


def _by_pieces(w_scales, pieces: int) -> list:
    """The scale of each piece of a tile's columns."""
    return [w_scales[i] for i in range(pieces)]


def _by_column(w_scales, pieces: int) -> list:
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
