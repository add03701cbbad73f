"""Which layers each rank of a pipeline runs, and how their weights come to it.

Between steps every layer is split over all ranks, so that a state does not depend on a schedule, and moments
of the optimizer are split as far as they can be. A step brings each rank its own layers, whole along the
pipeline; with schedules of two directions that is two copies of each (arXiv:2412.19437, section 3.2.1).
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import P
from jaxtyping import Array, Int

from dsv3_jax import mesh
from dsv3_jax.config import Config
from dsv3_jax.mesh import DATA, EXPERT, PIPELINE
from dsv3_jax.model import size
from dsv3_jax.pipeline.schedule import Schedule

Tree = TypeVar("Tree")


class Placement(NamedTuple):
    """The routed layers of each rank, those of its chunks one after another."""

    layers: Int[np.ndarray, "ranks N"]  # 0 where a rank has fewer: a copy that nothing reads
    starts: Int[np.ndarray, "ranks chunks"]  # where a chunk starts among them
    counts: Int[np.ndarray, "ranks chunks"]  # 0 or more


def placement(schedule: Schedule, c: Config) -> Placement:
    """Layers by rank for a schedule.

    Raises:
        ValueError: if the model has no routed layers.
    """
    if not c.routed_layers:
        raise ValueError(
            f"config.model.dense_layers={c.dense_layers} of layers={c.layers} leave no routed layers for the "
            "stages of a pipeline: lower dense_layers, or set config.mesh.pipeline=1."
        )
    shares = share_out(c, schedule.stages)
    numbered = np.cumsum([0, *shares])
    chunks = 1 + max(place.chunk for path in schedule.paths for place in path)
    counts = np.zeros((schedule.ranks, chunks), np.int32)
    stage_of = np.zeros((schedule.ranks, chunks), np.int32)
    for path in schedule.paths:
        for stage, place in enumerate(path):
            counts[place], stage_of[place] = shares[stage], stage
    starts = np.cumsum(counts, axis=1, dtype=np.int32) - counts
    layers = np.zeros((schedule.ranks, counts.sum(axis=1).max()), np.int32)
    for place in np.ndindex(counts.shape):
        start, end = starts[place], starts[place] + counts[place]
        number = int(numbered[stage_of[place]])
        layers[place[0], start:end] = range(number, number + int(counts[place]))
    return Placement(layers, starts, counts)


def share_out(c: Config, stages: int) -> list[int]:
    """Routed layers of each stage, so that the busiest stage has the least to do.

    The first stage also runs the dense layers, whose forward pass it repeats before their backward, and the
    last one the head and multi-token prediction.
    """
    cost = size.forward_cost(c)
    busy = np.zeros(stages)
    busy[0] += c.dense_layers * cost.dense * 4 / 3
    busy[-1] += cost.head * (1 + c.mtp_depth) + cost.mtp
    shares = np.zeros(stages, int)
    for _ in range(c.routed_layers):
        least = int(np.argmin(busy))
        shares[least] += 1
        busy[least] += cost.routed
    return shares.tolist()


def bring(stack: Tree, specs, layers: Int[np.ndarray, "ranks N"]) -> Tree:
    """The layers of this rank, [N, ...], whole along pipeline and data axes, from shards of all layers.

    Each rank sends the others its shards of their layers. The transpose sends gradients back and sums them
    over data, and over the copies of a layer.
    """

    def one(w: Array, spec: P) -> Array:
        axis = mesh.shard_axis(spec)
        if axis is None:
            return w[jnp.asarray(layers)[jax.lax.axis_index(PIPELINE)]]
        rows = jax.lax.all_to_all(w[layers], PIPELINE, split_axis=0, concat_axis=0, tiled=True)
        # Shards of one weight are numbered by data first, then by pipeline, then by expert.
        rows = jnp.moveaxis(rows, 0, axis)
        if EXPERT in spec[axis]:
            rows = jax.lax.all_gather(rows, EXPERT, axis=axis + 1, tiled=True)
        rows = rows.reshape(*rows.shape[:axis], -1, *rows.shape[axis + 2 :])
        return jax.lax.all_gather(rows, DATA, axis=axis, tiled=True)

    return jax.tree.map(one, stack, specs)
