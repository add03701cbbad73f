"""The three mesh axes, and the few collectives that weights and gradients need.

The axes always exist, with size 1 when unused, so no code asks whether one does. Outside the step
arrays are global and typed; inside its one `shard_map` they are local. This is the only file that uses
the names that moved between versions of JAX.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jax.experimental import mesh_utils

from dsv3_jax.config import Config
from pallas_kernels import support

PIPELINE, DATA, EXPERT = "pipeline", "data", "expert"
TOKENS = (DATA, EXPERT)  # every batch axis is split over both, in this order
SHARDS = (DATA, PIPELINE)  # between steps one axis of every matrix is split over both, in this order,
EVERYWHERE = (*SHARDS, EXPERT)  # or, of matrices that are not of experts, over all devices
AXES = (PIPELINE, *TOKENS)

Tree = TypeVar("Tree")


def make_mesh(
    pipeline: int = 1, data: int = 1, expert: int = 1, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
    """The mesh of all devices of the run, or of these, with explicit axes.

    Over several TPU slices the data axis crosses from one to the next, as it communicates least.

    Raises:
        ValueError: if the product of the sizes is not the number of devices, or slices do not split data.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"config.mesh.pipeline": pipeline, "config.mesh.data": data, "config.mesh.expert": expert}
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{key}={size} must be at least 1; use 1 for an axis that is not wanted.")
    need, have = math.prod(sizes.values()), len(devices)
    if need != have:
        product = " x ".join(f"{k}={v}" for k, v in sizes.items())
        raise ValueError(
            f"The mesh {product} needs {need} devices but JAX sees {have}: change the sizes so that their "
            f"product is {have}, or the devices (on a CPU, set JAX_NUM_CPU_DEVICES={need} before the start)."
        )
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    slices: dict[int, list] = {}  # for GPUs a slice is a host, which an axis may cross
    for device in devices:
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(number, []).append(device)
    if data % len(slices):
        raise ValueError(
            f"config.mesh.data={data} does not split over {len(slices)} slices: choose a multiple of "
            f"{len(slices)}, as pipeline and expert axes stay inside a slice."
        )
    within = (pipeline, data // len(slices), expert)
    grid = np.concatenate([_placed(within, slices[number]) for number in sorted(slices)], axis=1)
    return jax.sharding.Mesh(grid, AXES, axis_types=explicit)


def _placed(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices that are linked to each other, by mesh axis."""
    grid = _on_torus(sizes, devices)
    if grid is None:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return grid


def _on_torus(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray | None:
    """TPUs by mesh axis, each axis a box of chips; None where they are no box, or no box of theirs fits.

    Of all boxes, groups of experts have the one whose links are loaded least when all send to all.
    """
    places = np.array([(*getattr(d, "coords", ()), getattr(d, "core_on_chip", 0)) for d in devices])
    sides = places.max(axis=0) + 1 if places.shape[1] == 4 else (0,)
    if devices[0].platform != "tpu" or math.prod(sides) != len(devices) or sizes[2] % sides[-1]:
        return None
    pipeline, data, expert = sizes
    *torus, cores = map(int, sides)
    along = [[(n // (e * d), d, e) for e in _divisors(n) for d in _divisors(n // e)] for n in torus]
    wanted = (pipeline, data, expert // cores)
    boxes = [
        box for box in itertools.product(*along) if tuple(map(math.prod, zip(*box, strict=True))) == wanted
    ]
    if not boxes:
        return None

    def load(box: tuple) -> tuple:
        loads = [cores * _load(e, n) for (_, _, e), n in zip(box, torus, strict=True)]
        steps = [e * d for p, d, e in box if p > 1]  # hops to the next stage
        return max(loads), sum(loads), max(steps, default=0)

    box = np.array([*min(boxes, key=load), (1, 1, cores)])
    at = [np.unravel_index(column, row) for column, row in zip(places.T, box, strict=True)]
    grid = np.empty(sizes, object)
    for device, (stage, part, group) in zip(devices, np.array(at).transpose(2, 1, 0), strict=True):
        for n in range(1, 4):  # from one stage to the next it is one box on: every other row runs back
            if np.ravel_multi_index(stage[:n], box[:n, 0]) % 2:
                stage[n] = box[n, 0] - 1 - stage[n]
        numbers = (np.ravel_multi_index(i, box[:, axis]) for axis, i in enumerate((stage, part, group)))
        grid[tuple(numbers)] = device
    return grid


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _load(side: int, torus: int) -> float:
    """What its busiest link carries, of what each of the chips on a side of a box sends to all of them."""
    if side == torus and torus % 4 == 0:  # a ring, both ways round
        return side / 8
    return (side // 2) * (side - side // 2) / side


class Share(NamedTuple):
    """One of equal parts of a batch."""

    part: int
    parts: int


def share_of_process(sequences: tuple[str, ...] = TOKENS) -> Share:
    """The part of every batch that the devices of this process work on, of the mesh that is set.

    Processes that hold other stages of a pipeline, or other positions, for the same sequences have the same
    part.

    Args:
        sequences: the axes that sequences are split over.

    Raises:
        ValueError: if what processes hold are not equal parts.
    """
    devices = jax.sharding.get_mesh().devices
    over = [AXES.index(axis) for axis in sequences]
    rows: dict[int, set[tuple[int, ...]]] = {}
    for place, device in np.ndenumerate(devices):
        rows.setdefault(device.process_index, set()).add(tuple(place[axis] for axis in over))
    distinct = sorted({tuple(sorted(mine)) for mine in rows.values()})
    every = itertools.product(*(range(devices.shape[axis]) for axis in over))
    if sorted(itertools.chain(*distinct)) != list(every) or len({*map(len, distinct)}) > 1:
        sizes = dict(zip(AXES, devices.shape, strict=True))
        raise ValueError(
            f"Processes hold parts {distinct} of a batch on the mesh {sizes}, which are not equal: choose "
            "config.mesh sizes that the devices of a process divide."
        )
    return Share(distinct.index(tuple(sorted(rows[jax.process_index()]))), len(distinct))


def for_shapes() -> contextlib.AbstractContextManager:
    """A context for evaluating shapes: the mesh that is set, or one of size one without devices."""
    if jax.sharding.get_abstract_mesh().axis_names == AXES:
        return contextlib.nullcontext()
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1, 1), AXES, axis_types=explicit))


def check_divides(
    c: Config,
    batch_size: int,
    microbatches: int,
    data: int,
    expert: int,
    pipeline: int = 1,
    context: int = 1,
) -> None:
    """Refuses a model or batch that does not split over the mesh, naming every violation at once."""
    wrong = []
    shards = f"config.mesh.data={data}" + (f" x config.mesh.pipeline={pipeline}" if pipeline > 1 else "")
    split = {
        "config.model.d_model": c.d_model,
        "config.model.heads * (d_nope + d_rope)": c.heads * (c.d_nope + c.d_rope),
        "config.model.heads * (d_nope + d_value)": c.heads * (c.d_nope + c.d_value),
    }
    for key, size in split.items():
        if size % (data * pipeline):
            wrong.append(f"{key}={size} does not divide over {shards}: choose a divisor.")
    if c.experts % expert:
        wrong.append(
            f"config.model.experts={c.experts} do not divide over config.mesh.expert={expert}: "
            "choose a divisor."
        )
    if context not in (1, expert):
        wrong.append(
            f"config.mesh.context={context} is neither 1 nor config.mesh.expert={expert}: a sequence lies on "
            "one device of the expert axis, or on all of them."
        )
    if c.heads % context:
        wrong.append(
            f"config.model.heads={c.heads} do not divide over config.mesh.context={context}: "
            "choose a divisor."
        )
    own = {"config.mesh.data": data} | ({"config.mesh.expert": expert} if context == 1 else {})
    rows = microbatches * math.prod(own.values())
    if batch_size % rows:
        wrong.append(
            f"config.train.batch_size={batch_size} does not divide over config.pipeline.microbatches="
            f"{microbatches} x {' x '.join(f'{k}={v}' for k, v in own.items())}: choose a multiple of {rows}."
        )
    if wrong:
        raise ValueError("\n".join(wrong))


def spec(x: jax.Array) -> P:
    """How an array outside `shard_map` is laid out over the mesh."""
    sharding = jax.typeof(x).sharding
    return sharding.spec


def specs(tree):
    """The layout of every leaf."""
    return jax.tree.map(spec, tree)


def layer_specs(tree):
    """The layout of one layer of a stack: without the leading layer axis."""
    return jax.tree.map(lambda s: P(*s[1:]), tree, is_leaf=lambda s: isinstance(s, P))


def vary(tree: Tree) -> Tree:
    """Types every leaf as different on each device, so that its gradient is not summed behind our back."""

    return jax.tree.map(lambda w: support.vary_over(w, AXES), tree)


def vary_like(tree: Tree, *inputs: jax.Array) -> Tree:
    """Types fresh values (zeros to start a loop with) as varying over the axes that the inputs vary over."""
    return jax.tree.map(lambda x: support.vary_like(x, *inputs), tree)


def cast(weights: Tree, specs, dtype: jnp.dtype) -> Tree:
    """Matrices in the compute type.

    Vectors (norm gains) stay as they are: they are small, and RMSNorm multiplies by them in FP32.
    """
    return jax.tree.map(lambda w, s: w if shard_axis(s) is None else w.astype(dtype), weights, specs)


def gather(weights: Tree, specs) -> Tree:
    """Assembles sharded weights (FSDP); the transpose is a reduce-scatter."""

    def one(w, s):
        axis = shard_axis(s)
        return w if axis is None else jax.lax.all_gather(w, s[axis], axis=axis, tiled=True)

    return jax.tree.map(one, weights, specs)


def shard_axis(spec: P) -> int | None:
    """Which axis of a weight is split over `SHARDS` or `EVERYWHERE`; None for vectors, which are whole."""
    return next((axis for axis, names in enumerate(spec) if names in (SHARDS, EVERYWHERE)), None)


def dividing(spec: P, shape: tuple[int, ...]) -> P:
    """The same layout, over `SHARDS` where an axis has no equal parts for `EVERYWHERE`."""
    devices = math.prod(jax.sharding.get_abstract_mesh().axis_sizes)
    few = (names == EVERYWHERE and bool(size % devices) for names, size in zip(spec, shape, strict=True))
    return P(*(SHARDS if small else names for small, names in zip(few, spec, strict=True)))


def reduce_gradients(grads: Tree, specs) -> Tree:
    """Sums per-device gradients over the axes a weight is not split over, laid out like the weights.

    Over the axes it is split over, `gather`'s transpose and the expert all-to-all have summed already.
    """

    def one(g, s):
        axes = tuple(a for a in AXES if a not in _names(s))
        return jax.lax.psum(g, axes) if axes else g

    return jax.tree.map(one, grads, specs)


def _names(s: P) -> set[str]:
    """The mesh axes that appear anywhere in a spec."""
    return {n for entry in s if entry for n in ((entry,) if isinstance(entry, str) else entry)}
