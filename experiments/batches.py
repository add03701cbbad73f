"""From rows on the host to batches on the mesh."""

import jax
import numpy as np

from dsv3_jax.data.packing import Rows
from dsv3_jax.pipeline.objective import Batch, batch_spec


def training_batch(rows: Rows, microbatches: int) -> Batch:
    """Micro-batches of the rows of all processes; each gives its own."""
    return Batch(*(_place(x.reshape(microbatches, -1, x.shape[-1])) for x in rows))


def validation_batch(rows: Rows, devices: int, most: int) -> Batch:
    """All rows, the same on every process, as micro-batches of at most `most` sequences, padded."""
    count = len(rows.tokens)
    size = max(min(most, count) // devices, 1) * devices
    missing = -count % size
    padded = (np.pad(x, ((0, missing), (0, 0))) for x in rows)  # segment 0: nothing of it counts
    return Batch(*(_spread(x.reshape(-1, size, x.shape[-1])) for x in padded))


def _place(local: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(_sharding(), local)


def _spread(everything: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(everything.shape, _sharding(), lambda index: everything[index])


def _sharding() -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), batch_spec())
