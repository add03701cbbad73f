"""The scaled product on TPU: native FP8 products on tpu7x; older chips widen the operands on their way in.

The product of one group of columns is a separate dot, whose result the vector unit multiplies by a row's
scale and a column's and adds to FP32 sums in VMEM. That costs the same for any group, so wide groups are
faster; see tuning.py. Scaling the operands instead, to BF16 in VMEM, would be cheaper but rounds them.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.fp8_matmul import tuning
from pallas_kernels.scaled import Scaled
from pallas_kernels.support import cost, out_like

LANES = 128
STRIP = 256  # columns of one dot, the width of an MXU


def serves(x: Scaled) -> bool:
    """Whether groups are whole lanes."""
    return x.tile[1] % LANES == 0


@partial(jax.jit, static_argnames=("dtype", "tiles", "interpret"))
def matmul(
    x: Scaled,
    w: Scaled,
    into: Float32[Array, "M N"] | None = None,
    dtype=jnp.bfloat16,
    *,
    tiles: tuning.TpuTiles | None = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """The definition's product, for groups of any multiple of 128 columns."""
    (m, k), n, group = x.shape, w.shape[0], x.tile[1]
    tiles = (tiles or tuning.tpu(group)).within(m, n, k, group)
    steps, groups = pl.cdiv(k, tiles.depth), tiles.depth // group
    x_scales = _lines(x.scales, m, 1, steps, groups)
    w_scales = _lines(w.scales, n, w.tile[0], steps, groups)
    sums = [] if into is None else [into]
    result = pl.BlockSpec((tiles.rows, tiles.columns), lambda i, j, s: (i, j))
    width = _up(tiles.rows, LANES)
    out = out_like((m, n), dtype, x, w, *sums)
    return pl.pallas_call(
        partial(_kernel, k=k, group=group, depth=tiles.depth),
        grid=(pl.cdiv(m, tiles.rows), pl.cdiv(n, tiles.columns), steps),
        in_specs=[
            pl.BlockSpec((tiles.rows, tiles.depth), lambda i, j, s: (i, s)),
            pl.BlockSpec((tiles.columns, tiles.depth), lambda i, j, s: (j, s)),
            pl.BlockSpec((None, groups, width), lambda i, j, s: (s, 0, i)),
            pl.BlockSpec((None, groups, _up(tiles.columns, LANES)), lambda i, j, s: (s, 0, j)),
            *[result] * len(sums),
        ],
        out_specs=result,
        out_shape=out,
        cost_estimate=cost(2 * m * n * k, (x, w, sums), out),
        scratch_shapes=[
            pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32),
            pltpu.VMEM((groups, width, LANES), jnp.float32),
        ],
        input_output_aliases={4: 0} if sums else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tuning.TPU_VMEM
        ),
        interpret=interpret,
    )(x.values, w.values, x_scales, w_scales, *sums)


def _up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def _lines(
    scales: Float32[Array, "RT KT"], rows: int, tile: int, steps: int, groups: int
) -> Float32[Array, "S G R"]:
    """For each step along K and each of its groups, the scale of every row, along lanes."""
    along = scales.T if tile == 1 else jnp.repeat(scales.T, tile, axis=1)[:, :rows]
    missing = steps * groups - along.shape[0]
    return jnp.pad(along, ((0, missing), (0, -rows % LANES))).reshape(steps, groups, -1)


def _kernel(x, w, x_scales, w_scales, *rest, k: int, group: int, depth: int):
    """Adds one block of K to the sums of one tile."""
    *into, out, total, spread = rest
    step, last = pl.program_id(2), pl.cdiv(k, depth) - 1

    @pl.when(step == 0)
    def _():
        total[...] = into[0][...] if into else jnp.zeros_like(total)

    for g in range(spread.shape[0]):  # each row's scale in all lanes
        spread[g] = jnp.broadcast_to(x_scales[g : g + 1, :], (LANES, x_scales.shape[1])).T

    # Memory past the end of K holds anything, so the last block is not read to its end.
    add = partial(_add, x, w, w_scales, total, spread, group)
    if k % depth == 0:
        add(depth)
    else:
        pl.when(step < last)(lambda: add(depth))
        pl.when(step == last)(lambda: add(k % depth))

    @pl.when(step == last)
    def _():
        out[...] = total[...].astype(out.dtype)


def _add(x, w, w_scales, total, spread, group: int, depth: int) -> None:
    """The products of the groups in so many columns, a strip of the result at a time."""
    rows, columns = total.shape
    for start in range(0, columns, STRIP):
        strip = slice(start, min(start + STRIP, columns))
        for g, first in enumerate(range(0, depth, group)):
            part = slice(first, min(first + group, depth))
            product = lax.dot_general(
                x[:, part], w[strip, part], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            for left in range(start, strip.stop, LANES):
                lanes = slice(left, min(left + LANES, columns))
                scale = spread[g, :rows, : lanes.stop - left] * w_scales[g : g + 1, lanes]
                total[:, lanes] += product[:, left - start : lanes.stop - start] * scale
