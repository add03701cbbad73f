"""12 bits a value on Hopper: a program takes 64 rows of a tile of the first half, and of its partner.

ptxas 13.0.88 gives a thread 209 registers to pack and 167 to unpack, so two programs share a multiprocessor.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels import hopper
from pallas_kernels.quantize import e5m6
from pallas_kernels.quantize.gpu import LINE, ROWS, aligned, launch
from pallas_kernels.quantize.reference import TILE, e5m6_scale
from pallas_kernels.scaled import tiles
from pallas_kernels.support import out_like

_kernel_entry = partial(jax.jit, static_argnames="interpret")


def serves(rows: int, columns: int) -> bool:
    """Whether both halves of a row are whole tiles."""
    return rows > 0 and columns % (2 * TILE) == 0


@_kernel_entry
def pack(x: Float[Array, "M K"], *, interpret=None) -> tuple[UInt8[Array, "M 3 K/2"], Float32[Array, "M KT"]]:
    """The definition's."""
    m, k = x.shape
    results = [
        out_like((m, 3, k // 2), jnp.uint8, x),
        out_like((k // TILE, tiles(m, 4) * 4), jnp.float32, x),
    ]
    bits, scales = launch(_pack_kernel, _grid(m, k), results, interpret)(x)
    return bits, scales[:, :m].T


@_kernel_entry
def unpack(
    bits: UInt8[Array, "M 3 K/2"], scales: Float32[Array, "M KT"], *, interpret=None
) -> Float[Array, "M K"]:
    """The definition's."""
    m, k = len(bits), 2 * bits.shape[2]
    out = out_like((m, k), jnp.bfloat16, bits, scales)
    return launch(_unpack_kernel, _grid(m, k), out, interpret)(bits, aligned(scales.T))


def _pack_kernel(x, bits, scales):
    rows, group, halves = _place(scales.shape[0])

    @partial(
        pl.run_scoped,
        buffers=plgpu.SMEM((2, ROWS, TILE), x.dtype, transforms=hopper.swizzled(LINE, x.dtype)),
        results=plgpu.SMEM((3, ROWS, TILE), jnp.uint8, transforms=hopper.swizzled(LINE, jnp.uint8)),
        of_rows=plgpu.SMEM((2, ROWS), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=2),
    )
    def _(buffers, results, of_rows, arrived):
        for half in range(2):
            window = (rows, pl.ds(halves[half] * TILE, TILE))
            plgpu.copy_gmem_to_smem(x.at[window], buffers.at[half], arrived)
        plgpu.barrier_wait(arrived)
        codes = []
        for half in range(2):
            piece = hopper.load(buffers.at[half], plgpu.Layout.WGMMA).astype(jnp.float32)
            scale = e5m6_scale(jnp.max(jnp.abs(piece), axis=1))
            of_rows[half] = scale
            codes.append(e5m6.code(piece * lax.broadcast_in_dim(1 / scale, piece.shape, [0])))
        for plane, byte in enumerate(e5m6.to_bytes(*codes)):
            results[plane] = byte.astype(jnp.uint8)
        plgpu.commit_smem()
        for plane in range(3):
            window = (rows, plane, pl.ds(group * TILE, TILE))
            plgpu.copy_smem_to_gmem(results.at[plane], bits.at[window])
        for half in range(2):
            plgpu.copy_smem_to_gmem(of_rows.at[half], scales.at[halves[half], rows])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _unpack_kernel(bits, scales, out):
    rows, group, halves = _place(scales.shape[0])

    @partial(
        pl.run_scoped,
        buffers=plgpu.SMEM((3, ROWS, TILE), jnp.uint8, transforms=hopper.swizzled(LINE, jnp.uint8)),
        of_rows=plgpu.SMEM((2, ROWS), jnp.float32),
        results=plgpu.SMEM((2, ROWS, TILE), out.dtype, transforms=hopper.swizzled(LINE, out.dtype)),
        arrived=plgpu.Barrier(num_arrivals=5),
    )
    def _(buffers, of_rows, results, arrived):
        for plane in range(3):
            window = (rows, plane, pl.ds(group * TILE, TILE))
            plgpu.copy_gmem_to_smem(bits.at[window], buffers.at[plane], arrived)
        for half in range(2):
            plgpu.copy_gmem_to_smem(scales.at[halves[half], rows], of_rows.at[half], arrived)
        plgpu.barrier_wait(arrived)
        parts = [hopper.load(buffers.at[p], plgpu.Layout.WGMMA).astype(jnp.int32) for p in range(3)]
        for half, code in enumerate(e5m6.from_bytes(*parts)):
            scale = lax.broadcast_in_dim(hopper.load(of_rows.at[half], hopper.ROWS), code.shape, [0])
            results[half] = (e5m6.value(code) * scale).astype(out.dtype)
        plgpu.commit_smem()
        for half in range(2):
            window = (rows, pl.ds(halves[half] * TILE, TILE))
            plgpu.copy_smem_to_gmem(results.at[half], out.at[window])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _grid(m: int, k: int) -> tuple[int, int]:
    return tiles(m, ROWS), k // (2 * TILE)


def _place(groups: int) -> tuple:
    """A program's rows, its tile of the first half, and that with the one of the second."""
    i, group = lax.axis_index("row"), lax.axis_index("column")
    return pl.ds(i * ROWS, ROWS), group, (group, group + groups // 2)
