"""From rows on the host to batches on the mesh."""

import math

import jax
import numpy as np

from dsv3_jax.data.packing import Rows
from dsv3_jax.ops.context import WHOLE, Context
from dsv3_jax.pipeline.objective import Batch, batch_spec


def training_batch(rows: Rows, microbatches: int, context: Context = WHOLE) -> Batch:
    """Micro-batches of the rows of all processes; each gives its own."""
    layout = _layout(context)
    split = (x.reshape(microbatches, -1, x.shape[-1]) for x in rows)
    return Batch(*(jax.make_array_from_process_local_data(layout, x) for x in split))


def validation_batch(rows: Rows, most: int, context: Context = WHOLE) -> Batch:
    """All rows, the same on every process, as micro-batches of at most `most` sequences, padded."""
    count, layout = len(rows.tokens), _layout(context)
    parts = math.prod(layout.mesh.shape[axis] for axis in context.sequences)
    size = max(min(most, count) // parts, 1) * parts
    missing = -count % size
    padded = (np.pad(x, ((0, missing), (0, 0))) for x in rows)  # segment 0: nothing of it counts
    return Batch(*(_spread(x.reshape(-1, size, x.shape[-1]), layout) for x in padded))


def _spread(everything: np.ndarray, layout: jax.sharding.NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(everything.shape, layout, lambda index: everything[index])


def _layout(context: Context) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), batch_spec(context))
