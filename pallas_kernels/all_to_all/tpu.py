"""The exchange on TPU: each device writes its blocks into the memory of their receivers by remote DMA.

Every device first learns that all others have entered the kernel, so that their memory is there to be written
to, and leaves only after all have learnt the same. Without the second half a device that receives nothing
could enter its next exchange, be counted there in place of one that is late here, and let others write too
early. Exchanges over one axis share a barrier semaphore; each axis has its own, as its peers are others.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.all_to_all.reference import Rows, first
from pallas_kernels.support import out_like

Tree = TypeVar("Tree")

# The most rows of a partial block that travel as one. Of 7168 columns in FP8 they are 0.9 MB: 9 us on a link
# of 100 GB/s, long beside what a DMA should cost to start. Half a chunk a pair is sent in vain on average.
# Nothing was timed on a device.
CHUNK = 128
_FIRST_BARRIER = 1  # 0 is that of the kernel that jax comes with, an all-gather
_HBM = pl.BlockSpec(memory_space=pltpu.HBM)
_SMEM = pl.BlockSpec(memory_space=pltpu.SMEM)
_SEMAPHORE = pl.BlockSpec(memory_space=pltpu.SEMAPHORE)


def serves(x: Shaped[Array, "n T D"], rows: Rows | None) -> bool:
    """Whether there is anything to exchange, and parts of blocks begin where tiles of memory do."""
    tile = 32 // x.dtype.itemsize
    return len(x) > 1 and x.size > 0 and x.dtype.itemsize <= 4 and (rows is None or _chunk(x) % tile == 0)


def exchange(
    x: Shaped[Array, "n T D"], rows: Rows | None, axis: str, *, interpret=False
) -> Shaped[Array, "n T D"]:
    """The definition's."""
    n, scalars = len(x), _scalars(x, rows)

    def kernel(*refs):
        place, *counts, x, out, send, receive, entered = refs
        transfer = _transfer(x, out, send, receive, counts, place, axis)
        _start(transfer, entered)
        _finish(transfer)

    y = pl.pallas_call(
        kernel,
        in_specs=[_SMEM] * len(scalars) + [_HBM],
        out_specs=_HBM,
        out_shape=out_like(x.shape, x.dtype, x, rows),
        scratch_shapes=[*[pltpu.SemaphoreType.DMA((n,))] * 2, pltpu.SemaphoreType.REGULAR],
        compiler_params=_params(axis),
        cost_estimate=_cost(x),
        interpret=interpret,
        name=f"{axis}_all_to_all",
    )(*scalars, x)
    return _defined(y, rows)


def overlap(
    work: Callable, operands: tuple, x: Shaped[Array, "n T D"], rows: Rows | None, axis: str
) -> tuple[Shaped[Array, "n T D"], object]:
    """The exchange and the result of the work, which the barriers keep between its two kernels."""
    future, operands = hold([start(x, rows, axis)], operands)
    (future,), result = hold(future, work(*operands))
    return done(future, rows, axis), result


class Future(NamedTuple):
    """An exchange on its way, from `start`, to be given to `done` once.

    The interpreter does not hand semaphores from one kernel to the next (jax 0.12.0): it runs `exchange`,
    which is both halves in one kernel. That XLA keeps source and result in place between the two is read
    from compiled programs; no device has run them.
    """

    source: Shaped[Array, "n T D"]
    out: Shaped[Array, "n T D"]
    send: Array
    receive: Array


def start(x: Shaped[Array, "n T D"], rows: Rows | None, axis: str) -> Future:
    """Begins to send. The blocks pass through, so that their memory is not reused before they are sent.

    They and the result are in HBM by type: XLA would bring to VMEM what has not arrived yet.
    """
    n, scalars = len(x), _scalars(x, rows)

    def kernel(*refs):
        place, *counts, x, _, out, send, receive, entered = refs
        _start(_transfer(x, out, send, receive, counts, place, axis), entered)

    return Future(
        *pl.pallas_call(
            kernel,
            in_specs=[_SMEM] * len(scalars) + [_HBM],
            out_specs=[_HBM] * 2 + [_SEMAPHORE] * 2,
            out_shape=[pltpu.HBM.like(x)] * 2 + [pltpu.SemaphoreType.DMA((n,))] * 2,
            scratch_shapes=[pltpu.SemaphoreType.REGULAR],
            input_output_aliases={len(scalars): 0},
            compiler_params=_params(axis),
            cost_estimate=_cost(x),
            name=f"{axis}_all_to_all_start",
        )(*scalars, x)
    )


def hold(futures: list[Future], others: Tree) -> tuple[list[Future], Tree]:
    """Exchanges on their way and others, none of which is used before all are there."""
    outs, others = lax.optimization_barrier(([future.out for future in futures], others))
    return [future._replace(out=out) for future, out in zip(futures, outs, strict=True)], others


def done(future: Future, rows: Rows | None, axis: str) -> Shaped[Array, "n T D"]:
    """Waits until all has been sent and received."""
    scalars = _scalars(future.out, rows)

    def kernel(*refs):
        place, *counts, x, _, send, receive, out = refs
        _finish(_transfer(x, out, send, receive, counts, place, axis))

    y = pl.pallas_call(
        kernel,
        in_specs=[_SMEM] * len(scalars) + [_HBM] * 2 + [_SEMAPHORE] * 2,
        out_specs=_HBM,
        out_shape=pltpu.HBM.like(future.out),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(has_side_effects=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=0),
        name=f"{axis}_all_to_all_done",
    )(*scalars, *future)
    return _defined(y, rows)


class Transfer(NamedTuple):
    """What a kernel has of an exchange: references, with a semaphore for each peer and direction."""

    x: Any
    out: Any
    send: Any
    receive: Any
    counts: list  # of chunks sent and received, or nothing where blocks travel whole
    place: list  # of this device, on each axis of the mesh
    axis: int  # of the mesh, the one that is exchanged over
    chunk: int


def _transfer(x, out, send, receive, counts: list, place, axis: str) -> Transfer:
    axes = _axes()
    here = [place[i] for i in range(len(axes))]
    return Transfer(x, out, send, receive, counts, here, axes.index(axis), _chunk(x))


def _start(t: Transfer, entered) -> None:
    """Sends, once all have entered, and returns when all have learnt that all have."""
    n = t.x.shape[0]

    def tell(semaphore):
        _each(1, n, lambda i: pl.semaphore_signal(semaphore, 1, device_id=_device(t, _peer(t, i))))

    barrier = pltpu.get_barrier_semaphore()
    tell(barrier)
    pl.semaphore_wait(barrier, n - 1)
    tell(entered)
    _each(1, n, lambda i: _each_part(t, 0, _peer(t, i), lambda part: _to(t, _peer(t, i), part).start()))
    _each_part(t, 0, _peer(t, 0), lambda part: _kept(t, part).start())
    pl.semaphore_wait(entered, n - 1)


def _finish(t: Transfer) -> None:
    """Waits for each part that is sent and each that comes."""
    n = t.x.shape[0]

    def wait(i):
        to, by = _peer(t, i), _peer(t, n - i)
        _each_part(t, 0, to, lambda part: _wait(t.x.at[to, part], t.send.at[to]))
        _each_part(t, 1, by, lambda part: _wait(t.out.at[by, part], t.receive.at[by]))

    _each_part(t, 0, _peer(t, 0), lambda part: _kept(t, part).wait())
    _each(1, n, wait)


def _peer(t: Transfer, i) -> Int32[Array, ""]:
    """The device that is i further; all send to different ones at a time."""
    return lax.rem(t.place[t.axis] + i, t.x.shape[0])


def _device(t: Transfer, peer) -> tuple:
    """Its place in the mesh; by name alone, a checked `shard_map` could not lower the other axes."""
    return (*t.place[: t.axis], peer, *t.place[t.axis + 1 :])


def _to(t: Transfer, peer, part):
    """The copy of a part of the peer's block into its memory."""
    me = _peer(t, 0)
    return pltpu.make_async_remote_copy(
        t.x.at[peer, part], t.out.at[me, part], t.send.at[peer], t.receive.at[me], device_id=_device(t, peer)
    )


def _kept(t: Transfer, part):
    """The copy of a part of the block that stays."""
    me = _peer(t, 0)
    return pltpu.make_async_copy(t.x.at[me, part], t.out.at[me, part], t.receive.at[me])


def _wait(part, semaphore) -> None:
    """Waits for as many bytes as there are in the part of an array, whoever copies them."""
    pltpu.make_async_copy(part, part, semaphore).wait()


def _each(start: int, end, do: Callable) -> None:
    lax.fori_loop(start, end, lambda i, _: do(i), None)


def _each_part(t: Transfer, direction: int, peer, do: Callable) -> None:
    """All parts of a block that travel: the whole, or as many chunks as are counted."""
    if not t.counts:
        do(pl.ds(0, t.x.shape[1]))
    else:
        chunk = t.chunk
        _each(0, t.counts[direction][peer], lambda j: do(pl.ds(pl.multiple_of(j * chunk, chunk), chunk)))


def _chunk(x: Shaped[Array, "n T D"]) -> int:
    """Rows that travel at once where not all do: a divisor of T."""
    return math.gcd(x.shape[1], CHUNK)


def _scalars(x: Shaped[Array, "n T D"], rows: Rows | None) -> list[Int32[Array, " k"]]:
    """This device's place in the mesh, which kernels in a checked `shard_map` cannot ask for, and counts."""
    place = jnp.stack([lax.axis_index(a) for a in _axes()])
    chunk = _chunk(x)
    # More rows than there are would be written beyond the receiver's block.
    counts = [jnp.clip(count, 0, x.shape[1]) for count in rows or ()]
    return [place, *(lax.div(count + (chunk - 1), chunk) for count in counts)]


def _axes() -> tuple[str, ...]:
    return jax.sharding.get_abstract_mesh().axis_names


def _defined(y: Shaped[Array, "n T D"], rows: Rows | None) -> Shaped[Array, "n T D"]:
    """Zeros in place of memory that nothing was written to, and of what filled up the last chunk."""
    return y if rows is None else first(y, rows.received)


def _cost(x: Shaped[Array, "n T D"]) -> pl.CostEstimate:
    """At most, as what there is to send is known only when it is: all blocks but the one that stays."""
    size = x.size * x.dtype.itemsize
    return pl.CostEstimate(
        flops=0, transcendentals=0, bytes_accessed=2 * size, remote_bytes_transferred=size - size // len(x)
    )


def _params(axis: str) -> pltpu.CompilerParams:
    # With side effects XLA neither copies the exchange nor moves it to where only some devices come by.
    number = _FIRST_BARRIER + _axes().index(axis)
    return pltpu.CompilerParams(collective_id=number, has_side_effects=True)
